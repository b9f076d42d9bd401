"""DPO takes the losses and gradients that TRL 1.16's `DPOTrainer` takes on the same batch."""

from dataclasses import replace
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rayrlhf.algorithms.losses import direct_preference_loss
from rayrlhf.data.supervised.supervised_samples import PreferencePair, SupervisedSample
from rayrlhf.engines.objectives.preference import DirectPreferenceObjective
from rayrlhf.engines.train.supervised_batches import direct_preference_batch
from tests.engines.train.test_tuning_oracle import PAD, TOLERANCE, engine_of, gradient_error, step_of, trl_model_gradients
from tests.engines.training import write_llama

pytestmark = pytest.mark.usefixtures("alone")


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
        (DirectPreferenceObjective("hinge", beta=0.3), {"loss_type": ["hinge"]}, 5),
        (DirectPreferenceObjective("apo_zero", beta=0.3), {"loss_type": ["apo_zero"]}, 5),
        (DirectPreferenceObjective("apo_down", beta=0.3), {"loss_type": ["apo_down"]}, 5),
        # TRL smooths no labels of its sigmoid loss; of one pair alone, sorting nothing, this one is conservative DPO.
        (DirectPreferenceObjective("sigmoid", 0.3, 0.1), {"loss_type": ["aot_unpaired"], "label_smoothing": 0.1}, 1),
    ],
    ids=["sigmoid", "ipo", "robust", "hinge", "apo_zero", "apo_down", "conservative"],
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


class _OneProcess:
    device = torch.device("cpu")

    def gather_for_metrics(self, values):
        return values


def padded(answers):
    """TRL's arrays of answers: ids, attention mask, and labels that are -100 on prompts and padding."""
    width = max(len(answer.token_ids) for answer in answers)
    ids, attention, labels = (np.full((len(answers), width), fill) for fill in (PAD, 0, -100))
    for row, answer in enumerate(answers):
        ids[row, : len(answer.token_ids)] = answer.token_ids
        attention[row, : len(answer.token_ids)] = 1
        labels[row, : len(answer.token_ids)][answer.loss_mask] = answer.token_ids[answer.loss_mask]
    return dict(zip(("input_ids", "attention_mask", "labels"), map(torch.from_numpy, (ids, attention, labels)), strict=True))


def trl_reference_free(model, pairs, kind, **settings):
    """Loss of TRL's CPO or ORPO trainer on pairs, called on a stand-in with the trainer's attributes."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    trainer = ORPOTrainer if kind == "orpo" else CPOTrainer
    names = ("concatenated_forward", "cpo_loss", "odds_ratio_loss", "concatenated_inputs", "get_batch_logps")
    self = SimpleNamespace(
        is_encoder_decoder=False, aux_loss_enabled=False, accelerator=_OneProcess(), pad_token_id=PAD, padding_value=PAD,
        alpha=0.0, label_smoothing=0.0, simpo_gamma=0.5, cpo_alpha=1.0, loss_type=kind,
    )  # fmt: skip
    vars(self).update(settings)
    for name in names:
        member = vars(trainer).get(name)
        if member is not None:
            setattr(self, name, member.__func__ if isinstance(member, staticmethod) else MethodType(member, self))
    sides = {"chosen": [pair.chosen for pair in pairs], "rejected": [pair.rejected for pair in pairs]}
    batch = {f"{side}_{name}": array for side, answers in sides.items() for name, array in padded(answers).items()}
    return trainer.get_batch_loss_metrics(self, model, batch)


@pytest.mark.parametrize(
    ("ours", "kind", "settings"),
    [
        (DirectPreferenceObjective("simpo", 2.0, 0.1, 0.7), "simpo", {"simpo_gamma": 0.7, "cpo_alpha": 0.0}),
        (DirectPreferenceObjective("cpo", 0.3, 0.1, nll=0.8), "sigmoid", {"cpo_alpha": 0.8}),
        (DirectPreferenceObjective("orpo", 0.4, nll=1.0), "orpo", {}),
    ],
    ids=["simpo", "cpo", "orpo"],
)
def test_losses_without_reference_have_the_loss_and_gradients_of_trl(model, ours, kind, settings):
    pairs = [replace(pair, reference=None) for pair in random_pairs(4)]
    if kind == "orpo":  # TRL's likelihood is over the prompt too, of which a single token predicts nothing
        answers = [
            [
                SupervisedSample(a.token_ids[(~a.loss_mask).sum() - 1 :], np.arange(a.loss_mask.sum() + 1) > 0, a.row)
                for a in pair
            ]
            for pair in ((pair.chosen, pair.rejected) for pair in pairs)
        ]
        pairs = [replace(pair, chosen=one, rejected=two) for pair, (one, two) in zip(pairs, answers, strict=True)]
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    smoothing = {"beta": ours.beta, "label_smoothing": ours.label_smoothing}
    loss, metrics = trl_reference_free(oracle, pairs, kind, **smoothing, **settings)
    loss.backward()
    report, gradients = step_of(engine_of(model, frozenset({"lm"})), direct_preference_batch(pairs), ours)
    own = report.metrics["loss/direct_preference"] + (ours.nll * report.metrics["loss/nll"] if ours.nll else 0.0)
    assert own == pytest.approx(loss.item(), abs=TOLERANCE)
    assert gradient_error(gradients, trl_model_gradients(oracle)) <= TOLERANCE
    assert report.metrics["reward_chosen"] == pytest.approx(float(metrics["rewards/chosen"]), abs=TOLERANCE)
    assert report.metrics["margin"] == pytest.approx(float(metrics["rewards/margins"]), abs=TOLERANCE)


def test_an_answer_that_is_certain_has_finite_odds():
    sure = torch.zeros(1, 2, requires_grad=True)
    loss = direct_preference_loss(sure, torch.ones(1, 2), loss="orpo").loss
    loss.sum().backward()
    assert loss.isfinite().all()
    assert sure.grad.isfinite().all()


def test_a_pair_without_reference_is_one_whose_reference_finds_all_answers_certain():
    pairs = random_pairs(3)
    without = direct_preference_batch([replace(pair, reference=None) for pair in pairs])
    assert not without.arrays["reference_logprob"].any()
    assert direct_preference_batch(pairs).arrays["reference_logprob"][:, 0].all()
