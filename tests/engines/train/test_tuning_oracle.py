"""SFT and reward modelling take the losses and gradients that TRL 1.16's trainers take on the same batch."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rayrlhf.config.model import ModelSection
from rayrlhf.config.train import OptimizerSection, TrainSection
from rayrlhf.data.supervised.supervised_samples import PreferencePair, SupervisedSample
from rayrlhf.engines.objectives.preference import PreferenceObjective
from rayrlhf.engines.objectives.supervised import CrossEntropyObjective
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.engines.train.supervised_batches import preference_batch, supervised_batch
from tests.engines.training import write_llama

TOLERANCE = 1e-5
PAD = 0

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def model(tmp_path):
    return write_llama(tmp_path / "model")


def random_samples(count, seed=0):
    """Samples whose targets stand in several stretches, as the assistant's turns of a conversation do."""
    generator = np.random.default_rng(seed)
    samples = []
    for row in range(count):
        ids = generator.integers(2, 61, generator.integers(4, 30)).astype(np.int32)
        mask = generator.random(len(ids)) < 0.5
        mask[0], mask[-1] = False, True
        samples.append(SupervisedSample(ids, mask, row))
    return samples


def random_pairs(count, seed=0, *, margins=False):
    answers = random_samples(2 * count, seed)
    generator = np.random.default_rng(seed)
    return [
        PreferencePair(answers[2 * row], answers[2 * row + 1], float(generator.random()) if margins else None, row)
        for row in range(count)
    ]


def engine_of(model, heads, *, packing=False, budget=64, clip=None, head_bias=False):
    train = TrainSection(micro_batch_tokens=budget, max_grad_norm=clip, optimizer=OptimizerSection(name="sgd"))
    spec = TrainEngineSpec(
        ModelSection(path=str(model), dtype="float32"), heads, train, 0.0, packing=packing,
        targets_only=True, head_bias=head_bias, head_init="normal",
    )  # fmt: skip
    return TrainEngine(spec)


def step_of(engine, batch, objective):
    """One optimizer step: its statistics, and the gradients by parameter name."""
    gradients = {}
    step = engine._backend._engine.step

    def recording_step():
        gradients.update((name, parameter.grad.clone()) for name, parameter in engine._network.named_parameters())
        step()

    engine._backend._engine.step = recording_step
    report = engine.update(batch, UpdatePlan([[list(range(len(batch)))]]), objective)
    engine._backend._engine.step = step
    return report, gradients


def gradient_error(found, expected):
    assert set(found) == set(expected)
    return max(float((found[name] - expected[name]).abs().max()) for name in found)


def trl_model_gradients(model):
    return {f"model.{name}": parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("packing", [False, True])
def test_sft_has_the_loss_and_gradients_of_trl(model, tmp_path, packing):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    samples = random_samples(6)
    rows = [{"input_ids": s.token_ids.tolist(), "labels": np.where(s.loss_mask, s.token_ids, -100).tolist()} for s in samples]
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    arguments = SFTConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        per_device_train_batch_size=6, max_length=None, shuffle_dataset=False, disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
    )  # fmt: skip
    tokenizer = _tokenizer()
    trainer = SFTTrainer(model=oracle, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    inputs = trainer.data_collator(rows)
    items = torch.tensor(sum(int(sample.loss_mask.sum()) for sample in samples))
    loss = trainer.compute_loss(trainer.model.train(), dict(inputs), num_items_in_batch=items)
    loss.backward()

    report, gradients = step_of(
        engine_of(model, frozenset({"lm"}), packing=packing), supervised_batch(samples), CrossEntropyObjective()
    )
    assert report.metrics["loss/cross_entropy"] == pytest.approx(loss.item(), abs=TOLERANCE)
    assert report.metrics["loss/imitation"] == report.metrics["loss/cross_entropy"]  # the former name
    assert gradient_error(gradients, trl_model_gradients(oracle)) <= TOLERANCE


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("margins", "centering"), [(False, 0.0), (True, 0.01)])
def test_a_pair_has_the_loss_and_gradients_of_trl(model, tmp_path, margins, centering, packing):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    pairs = random_pairs(5, margins=margins)
    rows = [
        {"chosen_ids": p.chosen.token_ids.tolist(), "rejected_ids": p.rejected.token_ids.tolist()}
        | ({"margin": p.margin} if margins else {})
        for p in pairs
    ]
    engine = engine_of(model, frozenset({"value"}), packing=packing)
    oracle = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    oracle.config.pad_token_id = PAD
    oracle.score.weight.data.copy_(engine._network.v_head.summary.weight)
    arguments = RewardConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        per_device_train_batch_size=5, max_length=None, disable_tqdm=True, center_rewards_coefficient=centering or None,
    )  # fmt: skip
    trainer = RewardTrainer(model=oracle, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=_tokenizer())
    loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(rows))
    loss.backward()

    report, gradients = step_of(engine, preference_batch(pairs), PreferenceObjective(centering))
    ours = report.metrics["loss/bradley_terry"] + centering * report.metrics["loss/centering"]
    assert ours == pytest.approx(loss.item(), abs=TOLERANCE)
    assert report.metrics["accuracy"] == pytest.approx(trainer._metrics["train"]["accuracy"][0])
    expected = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    assert (
        gradient_error({name.replace("v_head.summary.", "score."): g for name, g in gradients.items()}, expected) <= TOLERANCE
    )


def _tokenizer():
    from rayrlhf.models.tiny import byte_tokenizer

    return byte_tokenizer()
