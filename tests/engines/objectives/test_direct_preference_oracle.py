"""DPO takes the losses and gradients that TRL 1.16's `DPOTrainer` takes on the same batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rayrlhf.data.supervised.supervised_samples import PreferencePair, SupervisedSample
from rayrlhf.engines.objectives.preference import DirectPreferenceObjective
from rayrlhf.engines.train.supervised_batches import direct_preference_batch
from tests.engines.train.test_tuning_oracle import PAD, TOLERANCE, engine_of, gradient_error, step_of, trl_model_gradients
from tests.engines.training import join_alone, write_llama


@pytest.fixture(scope="module", autouse=True)
def _alone():
    join_alone()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama") / "model")


def random_pairs(count, seed=0):
    """Pairs with log-probs of a reference that is not the policy, or the loss would be that of a coin."""
    generator = np.random.default_rng(seed)
    pairs = []
    for row in range(count):
        prompt, answers = generator.integers(2, 61, generator.integers(2, 9)), []
        for _ in range(2):
            ids = np.concatenate([prompt, generator.integers(2, 61, generator.integers(2, 15))]).astype(np.int32)
            answers.append(SupervisedSample(ids, np.arange(len(ids)) >= len(prompt), row))
        lengths = [int(answer.loss_mask.sum()) for answer in answers]
        first, second = (float(-4.2 * length + generator.normal()) for length in lengths)
        pairs.append(PreferencePair(answers[0], answers[1], None, row, (first, second)))
    return pairs


def trl_row(pair):
    chosen, rejected = pair.chosen, pair.rejected
    return {
        "prompt_ids": chosen.token_ids[~chosen.loss_mask].tolist(),
        "chosen_ids": chosen.token_ids[chosen.loss_mask].tolist(),
        "rejected_ids": rejected.token_ids[rejected.loss_mask].tolist(),
        "ref_chosen_logps": pair.reference[0],
        "ref_rejected_logps": pair.reference[1],
    }


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs", "count"),
    [
        (DirectPreferenceObjective(beta=0.3), {"loss_type": ["sigmoid"]}, 5),
        (DirectPreferenceObjective("ipo", beta=1.0), {"loss_type": ["ipo"]}, 5),
        (DirectPreferenceObjective("robust", 0.3, 0.1), {"loss_type": ["robust"], "label_smoothing": 0.1}, 5),
        # TRL smooths no labels of its sigmoid loss; of one pair alone, sorting nothing, this one is conservative DPO.
        (DirectPreferenceObjective("sigmoid", 0.3, 0.1), {"loss_type": ["aot_unpaired"], "label_smoothing": 0.1}, 1),
    ],
    ids=["sigmoid", "ipo", "robust", "conservative"],
)
def test_dpo_has_the_loss_gradients_and_metrics_of_trl(model, tmp_path, ours, theirs, count, packing):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from rayrlhf.models.tiny import byte_tokenizer

    pairs = random_pairs(count)
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        per_device_train_batch_size=count, max_length=None, disable_tqdm=True, beta=ours.beta, **theirs,
    )  # fmt: skip
    words = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    trainer = DPOTrainer(
        model=oracle, args=arguments, train_dataset=Dataset.from_list(words), processing_class=byte_tokenizer()
    )
    trainer.precompute_ref_logps = True  # the batch below brings what the reference says
    collator = trainer.data_collator
    collator.pad_token_id = PAD
    loss = trainer.compute_loss(trainer.model.train(), collator([trl_row(pair) for pair in pairs]))
    loss.backward()

    engine = engine_of(model, frozenset({"lm"}), packing=packing)
    report, gradients = step_of(engine, direct_preference_batch(pairs), ours)
    assert report.metrics["loss/direct_preference"] == pytest.approx(loss.item(), abs=TOLERANCE)
    assert gradient_error(gradients, trl_model_gradients(oracle)) <= TOLERANCE
    metrics = trainer._metrics["train"]
    for name, theirs_name in (
        ("accuracy", "rewards/accuracies"), ("margin", "rewards/margins"),
        ("reward_chosen", "rewards/chosen"), ("reward_rejected", "rewards/rejected"),
    ):  # fmt: skip
        assert report.metrics[name] == pytest.approx(metrics[theirs_name][0], abs=TOLERANCE)


def test_a_pair_without_reference_is_one_whose_reference_finds_all_answers_certain():
    pairs = random_pairs(3)
    without = direct_preference_batch([replace(pair, reference=None) for pair in pairs])
    assert not without.arrays["reference_logprob"].any()
    assert direct_preference_batch(pairs).arrays["reference_logprob"][:, 0].all()
