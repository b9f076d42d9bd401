"""Updates and scores with shared prefixes are those without, for every role and objective."""

import numpy as np
import pytest
import torch

from rayrlhf.config.algorithm import ParitySection
from rayrlhf.config.model import LoraSection, ModelSection
from rayrlhf.config.train import OptimizerSection, TrainSection
from rayrlhf.data.supervised.supervised_samples import PreferencePair, SupervisedSample
from rayrlhf.engines.objectives.policy import PolicyObjective, SharedObjective, ValueObjective
from rayrlhf.engines.objectives.preference import DirectPreferenceObjective, PreferenceObjective
from rayrlhf.engines.objectives.supervised import CrossEntropyObjective
from rayrlhf.engines.scoring.frozen import FrozenEngine
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.engines.train.supervised_batches import direct_preference_batch, preference_batch, supervised_batch
from tests.engines.training import grouped_sequences, random_batch, random_sequences
from tests.models.families import write_family

POLICY, SHARED, CRITIC = frozenset({"lm"}), frozenset({"lm", "value"}), frozenset({"value"})

pytestmark = pytest.mark.usefixtures("alone")


def engine_of(path, heads, share_prefixes, *, budget=70, lora=None, settings=None, **spec):
    train = TrainSection(
        micro_batch_tokens=budget, score_batch_tokens=budget, max_grad_norm=None, optimizer=OptimizerSection(name="sgd"),
        share_prefixes=share_prefixes, **(settings or {}),
    )  # fmt: skip
    return TrainEngine(
        # The learning rate makes steps larger than the weights, so that subtracting the weights rounds little.
        TrainEngineSpec(ModelSection(path=path, dtype="float32", lora=lora), heads, train, 1e3, head_init="normal", **spec)
    )


def pairs(count):
    sequences = grouped_sequences(count, 2)
    answers = [SupervisedSample(one.token_ids, np.arange(len(one.token_ids)) >= one.prompt_length, 0) for one in sequences]
    return [PreferencePair(answers[2 * row], answers[2 * row + 1], None, row) for row in range(count)]


def experience():
    return random_batch(grouped_sequences(3, 4))


def step_and_report(engine, batch, objective):
    """Return the change of the weights, as one tensor, and the report."""
    before = torch.cat([p.detach().flatten().clone() for p in engine._network.parameters() if p.requires_grad])
    report = engine.update(batch, UpdatePlan([[range(len(batch))]]), objective)
    return torch.cat([p.detach().flatten() for p in engine._network.parameters() if p.requires_grad]) - before, report


CASES = {
    "policy": (POLICY, PolicyObjective(), experience, {}),
    "critic": (CRITIC, ValueObjective(), experience, {}),
    "both": (SHARED, SharedObjective(PolicyObjective(), ValueObjective()), experience, {}),
    "adapters": (POLICY, PolicyObjective(), experience, {"lora": LoraSection(rank=4)}),
    "last layers": (POLICY, PolicyObjective(), experience, {"lora": LoraSection(rank=4, last_layers=1)}),
    "samples": (POLICY, PolicyObjective(), experience, {"settings": {"micro_batch_size": 3}}),
    "sft": (POLICY, CrossEntropyObjective(), lambda: supervised_batch([pair.chosen for pair in pairs(3) * 2]),
            {"targets_only": True, "packing": True}),
    "reward": (CRITIC, PreferenceObjective(), lambda: preference_batch(pairs(4)), {"targets_only": True}),
    "dpo": (POLICY, DirectPreferenceObjective(), lambda: direct_preference_batch(pairs(4)), {"targets_only": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_update_takes_the_step_of_samples_computed_apart(llama, case):
    heads, objective, batch, options = CASES[case]
    step, report = step_and_report(engine_of(llama, heads, "off", **options), batch(), objective)
    shared, other = step_and_report(engine_of(llama, heads, "auto", **options), batch(), objective)
    assert (shared - step).norm() <= 1e-6 * step.norm()
    assert other.metrics == pytest.approx(report.metrics, rel=1e-5, abs=1e-6)
    assert other.tokens == report.tokens
    assert report.shared_fraction == 0
    assert other.shared_fraction > 0.2
    assert other.computed == pytest.approx((1 - other.shared_fraction) * other.tokens)
    assert other.padding_share == 0
    assert other.token_metrics == {"tokens/computed": other.computed, "tokens/shared_fraction": other.shared_fraction}


@pytest.mark.parametrize("heads", [POLICY, CRITIC])
def test_scores_are_those_of_samples_computed_apart(llama, heads):
    outputs = frozenset({"logprobs", "entropy"} if heads == POLICY else {"values"})
    sequences = grouped_sequences(3, 4)
    plain = engine_of(llama, heads, "off").score(sequences, outputs)
    engine = engine_of(llama, heads, "auto")
    forwards = []
    engine._network.register_forward_pre_hook(lambda _, inputs: forwards.append(inputs[1]))
    for one, other in zip(engine.score(sequences, outputs), plain, strict=True):
        for name in outputs:
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-5, atol=2e-6)
    assert all(positions.parents is not None for positions in forwards)
    if heads == POLICY:
        reference = FrozenEngine(ModelSection(path=llama, dtype="float32"), 70)
        same = zip(reference.score(sequences, outputs), engine.score(sequences, outputs), strict=True)
        assert all(np.array_equal(one.logprobs, other.logprobs) for one, other in same)


def test_without_common_beginnings_nothing_changes(llama):
    batch = random_batch(random_sequences(8))
    found = [step_and_report(engine_of(llama, POLICY, share), batch, PolicyObjective()) for share in ("off", "auto")]
    assert torch.equal(found[0][0], found[1][0])
    assert found[1][1].shared_fraction == 0


@pytest.mark.parametrize(
    "options",
    [
        {"noise_alpha": 5.0},
        {"parity": ParitySection(no_accumulation=True)},
        {"family": "mistral"},
    ],
    ids=["noise differs between samples", "micro-batches are consecutive", "sliding window"],
)
def test_what_needs_samples_apart_keeps_them_apart_and_splits_by_all_tokens(llama, tmp_path, options):
    options = dict(options)
    family = options.pop("family", None)
    path = llama if family is None else str(write_family(family, tmp_path / "model"))
    reports, lines = [], []
    for share_prefixes in ("off", "auto"):
        engine = engine_of(path, POLICY, share_prefixes, **options)
        batches = []
        engine._network.register_forward_pre_hook(lambda _, inputs, batches=batches: batches.append(inputs[1].lengths))
        engine.score(experience().sequences, frozenset({"logprobs"}))
        report = step_and_report(engine, experience(), PolicyObjective())[1]
        reports.append((report.shared_fraction, report.computed, report.optimizer_steps, batches))
        lines.append(engine.load_check)
        assert not engine.shares_prefixes
    assert reports[0] == reports[1]
    assert reports[1][0] == 0
    assert lines[0].endswith("prefixes are not shared: train.share_prefixes is off")
    assert ("do not share prefixes" if family else "prefixes are not shared: ") in lines[1]
