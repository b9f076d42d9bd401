"""KTO takes the loss, gradients and batch KL that TRL 1.16's `KTOTrainer` takes on the same batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rayrlhf.data.supervised.supervised_samples import PreferencePair
from rayrlhf.engines.objectives.preference import UnpairedPreferenceObjective
from rayrlhf.engines.train.supervised_batches import unpaired_batch
from rayrlhf.tuning.unpaired_task import batch_kl, with_partners
from tests.engines.objectives.test_direct_preference_oracle import random_pairs
from tests.engines.train.test_tuning_oracle import PAD, TOLERANCE, engine_of, gradient_error, step_of, trl_model_gradients
from tests.engines.training import write_llama

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama") / "model")


def labeled_answers(count, shift):
    """Answers with partners and log-probs of a reference, whose KL to the policy is about minus `shift`."""
    generator = np.random.default_rng(0)
    answers = with_partners([replace(pair, reference=None) for pair in random_pairs(count)], 64, "rows")
    known = []
    for one in answers:
        lengths = [int(side.loss_mask.sum()) for side in (one.chosen, one.rejected)]
        own, partner = (float(-4.2 * length + generator.normal() + shift) for length in lengths)
        known.append(replace(one, reference=(own, partner)))
    return known


def trl_row(one: PreferencePair):
    own, partner = one.chosen, one.rejected
    return {
        "prompt_ids": own.token_ids[~own.loss_mask].tolist(),
        "completion_ids": own.token_ids[own.loss_mask].tolist(),
        "KL_completion_ids": partner.token_ids[partner.loss_mask].tolist(),
        "label": one.label,
        "ref_logps": one.reference[0],
        "ref_KL_logps": one.reference[1],
    }


@pytest.mark.parametrize("shift", [-12.0, 12.0], ids=["kl above 0", "kl at 0"])
def test_kto_has_the_loss_gradients_and_kl_of_trl(model, tmp_path, shift):
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    from rayrlhf.models.tiny import byte_tokenizer

    answers = labeled_answers(3, shift)
    ours = UnpairedPreferenceObjective(0.3, 1.2, 0.7)
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    arguments = KTOConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        per_device_train_batch_size=len(answers), max_length=None, disable_tqdm=True, beta=0.3, desirable_weight=1.2,
        undesirable_weight=0.7, train_sampling_strategy="sequential",
    )  # fmt: skip
    words = [{"prompt": "a", "completion": word, "label": word == "b"} for word in "bc"]
    trainer = KTOTrainer(
        model=oracle, args=arguments, train_dataset=Dataset.from_list(words), processing_class=byte_tokenizer()
    )
    trainer.precompute_ref_logps = True  # the batch below brings what the reference says
    collator = trainer.data_collator
    collator.pad_token_id = PAD
    loss = trainer.compute_loss(trainer.model.train(), collator([trl_row(one) for one in answers]))
    loss.backward()

    engine = engine_of(model, frozenset({"lm"}))
    kl = batch_kl(engine, answers)
    report, gradients = step_of(engine, unpaired_batch(answers, kl), ours)
    assert kl == pytest.approx(trainer._metrics["train"]["kl"][0], abs=1e-4)
    assert (kl > 0) == (shift < 0)
    assert report.metrics["loss/kto"] == pytest.approx(loss.item(), abs=TOLERANCE)
    assert report.metrics["batch_kl"] == pytest.approx(kl)
    assert gradient_error(gradients, trl_model_gradients(oracle)) <= TOLERANCE
