"""One rank of the train engine: the gradient is a property of the samples alone, and state and weights travel exactly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayrlhf.config.algorithm import KlSection, ParitySection, ValueLossSection
from rayrlhf.config.model import LoraSection, ModelSection
from rayrlhf.config.policy_loss import PPOLossSection
from rayrlhf.config.train import OptimizerSection, ScheduleSection, TrainSection
from rayrlhf.data.records import TokenSequence
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.base import Objective
from rayrlhf.engines.objectives.policy import PolicyObjective, SharedObjective, ValueObjective
from rayrlhf.engines.scoring.frozen import FrozenEngine
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.errors import UserError
from rayrlhf.models.frozen_prefix import FrozenPrefix
from rayrlhf.models.network import build_network
from rayrlhf.models.network_io import Positions
from tests.engines.training import grouped_sequences, random_batch, random_sequences, weights_of, write_llama

POLICY, SHARED, CRITIC = frozenset({"lm"}), frozenset({"lm", "value"}), frozenset({"value"})
LOGPROBS = frozenset({"logprobs"})
BOTH = SharedObjective(PolicyObjective(PPOLossSection(entropy_coefficient=0.05)), ValueObjective())

pytestmark = pytest.mark.usefixtures("alone")


def engine_of(path: str, heads: frozenset[Any] = SHARED, *, lora: LoraSection | None = None, **settings: Any) -> TrainEngine:
    outer = {
        name: settings.pop(name)
        for name in ("parity", "learning_rate", "head_learning_rate", "total_optimizer_steps")
        if name in settings
    }
    train = TrainSection(**{"optimizer": OptimizerSection(name="sgd"), "max_grad_norm": None, **settings})
    model = ModelSection(path=path, dtype="float32", lora=lora)
    spec = {"learning_rate": 1.0, "head_init": "normal", **outer}
    return TrainEngine(TrainEngineSpec(model=model, heads=heads, train=train, **spec))


def one_step(samples: int) -> UpdatePlan:
    return UpdatePlan([[list(range(samples))]])


def all_weights(engine: TrainEngine) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in engine._network.named_parameters()}


def largest_difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    assert set(first) == set(second)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_a_step_follows_the_gradient_of_the_plainly_written_objective(llama: str) -> None:
    sequences = random_sequences(6)
    batch = random_batch(sequences)
    engine = engine_of(llama, micro_batch_tokens=40)
    before = all_weights(engine)
    engine.update(batch, one_step(6), BOTH)
    network = build_network(ModelSection(path=llama, dtype="float32"), SHARED, "normal", 0)
    loss = plain_objective(network, batch)
    loss.backward()
    expected = {name: before[name] - parameter.grad for name, parameter in network.named_parameters()}
    assert largest_difference(all_weights(engine), expected) < 2e-6


@pytest.mark.parametrize("stage", [0, 2])
def test_a_value_head_on_the_trunk_has_a_learning_rate_of_its_own(llama: str, stage: int) -> None:
    batch = random_batch(random_sequences(6))
    moved = []
    for rate in (None, 0.25):
        engine = engine_of(llama, head_learning_rate=rate, zero_stage=stage)
        before = {**weights_of(engine), **head_of(engine)}
        engine.update(batch, one_step(6), BOTH)
        moved.append({name: weight - before[name] for name, weight in (weights_of(engine) | head_of(engine)).items()})
    for name, change in moved[0].items():
        assert change.abs().max() > 1e-4
        torch.testing.assert_close(moved[1][name], change * (0.25 if name.startswith("v_head") else 1.0), atol=1e-6, rtol=1e-4)


def head_of(engine: TrainEngine) -> dict[str, Tensor]:
    parameters = engine._network.v_head.named_parameters(prefix="v_head")  # type: ignore[union-attr]
    return {name: parameter.detach().clone() for name, parameter in parameters if parameter.numel()}


def plain_objective(network: Any, batch: TrainingBatch) -> Tensor:
    """PPO with entropy bonus and value loss, one sample at a time, from whole logits."""
    policy_terms, value_terms = [], []
    for row, sequence in enumerate(batch.sequences):
        tokens = torch.from_numpy(sequence.token_ids.astype(np.int64))
        start, length = sequence.prompt_length, sequence.response_length
        output = network.model(input_ids=tokens[None], output_hidden_states=True)
        log_p = output.logits[0, start - 1 : -1].log_softmax(-1)
        picked = log_p.gather(-1, tokens[start:, None]).squeeze(-1)
        values = network.v_head(output.hidden_states[-1][0, start - 1 : -1])
        old, advantage, old_value, target = (
            torch.from_numpy(batch.arrays[name][row, :length])
            for name in ("old_logprobs", "advantages", "old_values", "returns")
        )
        ratio = (picked - old).exp()
        surrogate = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
        entropy = -(log_p.exp() * log_p).sum(-1)
        actions = torch.from_numpy(batch.arrays["action_mask"][row, :length])
        policy_terms.append((surrogate - 0.05 * entropy)[actions])
        clipped = old_value + (values - old_value).clamp(-0.2, 0.2)
        value_terms.append(0.5 * torch.maximum((values - target) ** 2, (clipped - target) ** 2))
    return torch.cat(policy_terms).mean() + 0.1 * torch.cat(value_terms).mean()


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_micro_batches_order_and_padding_do_not_change_the_gradient(llama: str, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 99))
    sequences = random_sequences(5, seed)
    batch = random_batch(sequences, seed, extra_columns=data.draw(st.integers(0, 3)))
    order = data.draw(st.permutations(range(5)))
    cut = data.draw(st.sampled_from([{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"micro_batch_tokens": 30}]))
    whole, parts = engine_of(llama, micro_batch_tokens=10_000), engine_of(llama, **cut)
    reports = [
        whole.update(batch, one_step(5), BOTH),
        parts.update(batch, UpdatePlan([[order]]), BOTH),
    ]
    # Rounding grows with what is rounded: a few of the drawn batches have gradients of norm 40, most of 2 to 10.
    bound = 2e-6 * max(1.0, reports[0].grad_norms[0] / 10)
    assert largest_difference(all_weights(whole), all_weights(parts)) < bound
    for name, value in reports[0].metrics.items():
        assert reports[1].metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert reports[0].grad_norms == pytest.approx(reports[1].grad_norms, rel=1e-5)


def test_scores_come_back_in_order_and_do_not_depend_on_their_neighbours(llama: str) -> None:
    sequences = random_sequences(9, 3)
    outputs = frozenset({"logprobs", "entropy", "values", "hidden"})
    together = engine_of(llama).score(sequences, outputs, temperature=0.7)
    alone = engine_of(llama, score_batch_tokens=1).score(sequences, outputs, temperature=0.7)
    for sequence, first, second in zip(sequences, together, alone, strict=True):
        length = sequence.response_length
        assert first.logprobs.shape == first.entropy.shape == (length,)
        assert first.values.shape == (length + 1,)
        assert first.hidden.shape == (length, 32)
        for name in ("logprobs", "entropy", "values", "hidden"):
            np.testing.assert_allclose(getattr(first, name), getattr(second, name), rtol=1e-5, atol=5e-6)


def test_the_ratio_is_exactly_one_for_identical_micro_batches(llama: str) -> None:
    sequences = random_sequences(8, 1)
    engine = engine_of(llama, POLICY, micro_batch_tokens=60, score_batch_tokens=60)
    batch = random_batch(sequences)
    old = np.zeros_like(batch.arrays["old_logprobs"])
    for row, score in enumerate(engine.score(sequences, LOGPROBS)):
        old[row, : len(score.logprobs)] = score.logprobs
    fresh = TrainingBatch(sequences, {**batch.arrays, "old_logprobs": old})
    report = engine.update(fresh, one_step(8), PolicyObjective())
    assert report.metrics["val/ratio"] == 1.0
    assert report.metrics["policy/approxkl_avg"] == 0.0
    assert report.metrics["policy/clipfrac_avg"] == 0.0
    advantages = batch.arrays["advantages"][batch.arrays["action_mask"]]
    assert report.metrics["loss/policy_avg"] == pytest.approx(-advantages.mean(), rel=1e-5)


def test_the_reference_inside_an_adapted_policy_is_the_start_model_exactly(llama: str) -> None:
    sequences = random_sequences(6)
    engine = engine_of(llama, POLICY, lora=LoraSection(rank=2), learning_rate=10.0)
    start = engine.score(sequences, LOGPROBS)
    frozen = FrozenEngine(ModelSection(path=llama, dtype="float32"), 8192).score(sequences, LOGPROBS)
    for first, second in zip(start, frozen, strict=True):
        assert np.array_equal(first.logprobs, second.logprobs)
    engine.update(random_batch(sequences), one_step(6), PolicyObjective())
    moved, inside = engine.score(sequences, LOGPROBS), engine.score(sequences, LOGPROBS, reference=True)
    assert any(not np.array_equal(a.logprobs, b.logprobs) for a, b in zip(moved, start, strict=True))
    for first, second in zip(inside, start, strict=True):
        assert np.array_equal(first.logprobs, second.logprobs)


@pytest.mark.parametrize("sequences", [random_sequences(6), grouped_sequences(2, 3)], ids=["padded", "shared prefixes"])
def test_remembered_frozen_layers_change_no_number(llama: str, monkeypatch: pytest.MonkeyPatch, sequences) -> None:
    batch = random_batch(sequences)
    plan = UpdatePlan([[[0, 1, 2], [3, 4, 5]]] * 2)
    results, lower = [], []
    for supported in (True, False):
        if not supported:
            monkeypatch.setattr(FrozenPrefix, "supports", lambda *_, **__: False)
        engine = engine_of(llama, SHARED, lora=LoraSection(rank=2, last_layers=1), micro_batch_size=3, learning_rate=0.1)
        assert (engine._network.prefix is not None) == supported
        forwards: list[None] = []
        engine._network.trunk.layers[0].register_forward_hook(lambda *_, forwards=forwards: forwards.append(None))
        scores = [engine.score(sequences, LOGPROBS, reference=reference) for reference in (False, True, False)]
        report = engine.update(batch, plan, BOTH)
        lower.append(len(forwards))
        results.append((scores, report.metrics, all_weights(engine), engine.score(sequences, LOGPROBS)))
    assert lower[0] == (lower[1] - 4) / 3
    for first, second in zip([*results[0][0], results[0][3]], [*results[1][0], results[1][3]], strict=True):
        for one, other in zip(first, second, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=5e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4, abs=1e-6)
    assert largest_difference(results[0][2], results[1][2]) < 2e-6


def test_a_reference_is_refused_where_there_is_none_and_values_where_there_is_no_head(llama: str) -> None:
    engine = engine_of(llama, POLICY)
    with pytest.raises(ValueError, match="contains no reference model"):
        engine.score(random_sequences(1), LOGPROBS, reference=True)
    with pytest.raises(ValueError, match="without a value head"):
        engine.score(random_sequences(1), frozenset({"values"}))
    with pytest.raises(ValueError, match="without an output layer"):
        engine_of(llama, CRITIC).score(random_sequences(1), LOGPROBS)


def test_the_gradient_is_clipped_at_every_step_and_only_the_first_under_parity(llama: str) -> None:
    batch = random_batch(random_sequences(4))
    plan = UpdatePlan([[[0, 1], [2, 3]]])
    moves: dict[bool, list[float]] = {}
    for parity in (False, True):
        engine = engine_of(llama, max_grad_norm=0.01, parity=ParitySection(clip_first_step_only=parity))
        moves[parity] = []
        for rows in plan.epochs[0]:
            before = all_weights(engine)
            report = engine.update(batch, UpdatePlan([[rows]]), BOTH)
            after = all_weights(engine)
            moves[parity].append(float(torch.stack([(after[n] - before[n]).norm() for n in after]).norm()))
            assert report.grad_norms[0] > 0.01
    assert moves[False] == pytest.approx([0.01, 0.01], rel=1e-3)
    assert moves[True][0] == pytest.approx(0.01, rel=1e-3)
    assert moves[True][1] > 0.02


def test_a_kl_penalty_in_the_loss_pulls_towards_the_reference(llama: str) -> None:
    sequences = random_sequences(6)
    engine = engine_of(llama, POLICY, learning_rate=0.05)
    batch = random_batch(sequences)
    tables = {name: np.zeros_like(batch.arrays["advantages"]) for name in ("old_logprobs", "ref_logprobs", "advantages")}
    for row, score in enumerate(engine.score(sequences, LOGPROBS)):
        tables["old_logprobs"][row, : len(score.logprobs)] = score.logprobs
        tables["ref_logprobs"][row, : len(score.logprobs)] = score.logprobs - 1.0
    pulled = TrainingBatch(sequences, {**batch.arrays, **tables})
    objective = PolicyObjective(kl=KlSection(estimator="k3", placement="loss", coefficient=1.0))
    first = engine.update(pulled, one_step(6), objective)
    second = engine.update(pulled, one_step(6), objective)
    assert first.metrics["loss/kl_avg"] == pytest.approx(np.exp(-1.0), rel=1e-4)
    assert second.metrics["loss/kl_avg"] < first.metrics["loss/kl_avg"]


def test_importance_weights_multiply_the_surrogate_token_by_token(llama: str) -> None:
    batch = random_batch(random_sequences(4))
    ones = TrainingBatch(batch.sequences, {**batch.arrays, "importance_weights": np.ones_like(batch.arrays["advantages"])})
    halves = TrainingBatch(batch.sequences, {**batch.arrays, "advantages": batch.arrays["advantages"] / 2})
    weighted = TrainingBatch(batch.sequences, {**ones.arrays, "importance_weights": ones.arrays["importance_weights"] / 2})
    weights = []
    for experience, importance in ((ones, False), (ones, True), (halves, False), (weighted, True)):
        engine = engine_of(llama, POLICY)
        engine.update(experience, one_step(4), PolicyObjective(importance=importance))
        weights.append(all_weights(engine))
    assert largest_difference(weights[0], weights[1]) == 0.0
    assert largest_difference(weights[2], weights[3]) < 1e-6
    assert largest_difference(weights[0], weights[2]) > 1e-3


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_ratio_guard_leaves_an_exploded_mini_batch_out(llama: str, stage: int) -> None:
    batch = random_batch(random_sequences(4))
    exploded = TrainingBatch(batch.sequences, {**batch.arrays, "old_logprobs": batch.arrays["old_logprobs"] - np.float32(5.0)})
    engine = engine_of(llama, POLICY, ratio_guard=10.0, zero_stage=stage, micro_batch_size=2)
    before = weights_of(engine)
    report = engine.update(exploded, one_step(4), PolicyObjective())
    assert report.metrics["val/ratio"] > 10.0
    assert report.guarded_steps == 1
    assert largest_difference(weights_of(engine), before) == 0.0
    assert engine.update(batch, one_step(4), PolicyObjective()).guarded_steps == 0
    assert largest_difference(weights_of(engine), before) > 0.0


def test_epochs_stop_once_the_policy_moved_too_far(llama: str) -> None:
    batch = random_batch(random_sequences(4))
    # The sampling policy was surer of its tokens, so this one is at a positive distance from the start.
    batch = TrainingBatch(batch.sequences, {**batch.arrays, "old_logprobs": batch.arrays["old_logprobs"] + np.float32(3.0)})
    plan = UpdatePlan([[[0, 1], [2, 3]]] * 3)
    free = engine_of(llama, POLICY, learning_rate=0.1).update(batch, plan, PolicyObjective())
    assert (free.epochs, free.stopped_early, free.optimizer_steps) == (3, False, 6)
    kl = free.step_metrics[1]["ppo/policy/policykl"]
    assert kl > 0
    for target, stopped in ((kl / 1.4, False), (kl / 1.6, True)):
        engine = engine_of(llama, POLICY, learning_rate=0.1, early_stop_kl=target)
        report = engine.update(batch, UpdatePlan(plan.epochs[:1]), PolicyObjective())
        assert report.stopped_early == stopped
    report = engine_of(llama, POLICY, learning_rate=0.1, early_stop_kl=kl / 1.6).update(batch, plan, PolicyObjective())
    assert (report.epochs, report.optimizer_steps) == (1, 2)


def test_a_mini_batch_without_tokens_is_an_error_and_a_micro_batch_without_is_not(llama: str) -> None:
    batch = random_batch(random_sequences(4))
    mask = batch.arrays["action_mask"].copy()
    mask[0] = False
    holed = TrainingBatch(batch.sequences, {**batch.arrays, "action_mask": mask})
    engine = engine_of(llama, POLICY, micro_batch_size=1)
    assert np.isfinite(list(engine.update(holed, one_step(4), PolicyObjective()).metrics.values())).all()
    with pytest.raises(ValueError, match="no token under 'action_mask'"):
        engine.update(holed, UpdatePlan([[[0]]]), PolicyObjective())


def test_the_learning_rate_follows_its_schedule_over_the_whole_run(llama: str) -> None:
    schedule = ScheduleSection(shape="linear", warmup_steps=2)
    engine = engine_of(llama, POLICY, learning_rate=0.6, schedule=schedule, total_optimizer_steps=6)
    batch = random_batch(random_sequences(2))
    rates = [
        rate for _ in range(3) for rate in engine.update(batch, UpdatePlan([[[0], [1]]]), PolicyObjective()).learning_rates
    ]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.45, 0.3, 0.15])


@pytest.mark.parametrize(
    ("heads", "objective", "lora", "stage"),
    [
        (SHARED, BOTH, None, 0),
        (CRITIC, ValueObjective(ValueLossSection(coefficient=1.0)), None, 2),
        (POLICY, PolicyObjective(), LoraSection(rank=2), 0),
        (POLICY, PolicyObjective(), None, 3),
    ],
)
def test_a_resumed_engine_continues_bit_for_bit(
    llama: str, tmp_path: Path, heads: frozenset[Any], objective: Objective, lora: LoraSection | None, stage: int
) -> None:
    settings = {
        "lora": lora, "zero_stage": stage, "learning_rate": 0.01, "total_optimizer_steps": 8,
        "optimizer": OptimizerSection(name="adamw", weight_decay=0.1), "schedule": ScheduleSection(shape="cosine"),
    }  # fmt: skip
    batch = random_batch(random_sequences(6))
    plan = UpdatePlan([[[0, 1, 2], [3, 4, 5]]])
    engine = engine_of(llama, heads, **settings)
    engine.update(batch, plan, objective)
    engine.save_state(tmp_path / "state")
    random_numbers = torch.rand(3)
    expected = engine.update(batch, plan, objective), weights_of(engine)
    torch.manual_seed(99)
    resumed = engine_of(llama, heads, **settings)
    resumed.load_state(tmp_path / "state")
    assert torch.equal(torch.rand(3), random_numbers)
    assert resumed.optimizer_steps == 2
    found = resumed.update(batch, plan, objective), weights_of(resumed)
    assert found[0].metrics == expected[0].metrics
    assert found[0].learning_rates == expected[0].learning_rates
    assert largest_difference(found[1], expected[1]) == 0.0


def test_a_folder_without_state_is_the_users_mistake(llama: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no training state of rank 0"):
        engine_of(llama).load_state(tmp_path)


@pytest.mark.parametrize("tie", [True, False])
def test_buckets_hold_every_weight_once_in_the_dtype_asked_for(tmp_path: Path, tie: bool) -> None:
    engine = engine_of(str(write_llama(tmp_path / "model", tie=tie)), SHARED)
    names = [name for bucket in engine.weight_buckets(4000) for name, _ in bucket]
    assert len(names) == len(set(names))
    assert ("lm_head.weight" in names) != tie
    assert not any(name.startswith("v_head") for name in names)
    assert len(list(engine.weight_buckets(4000))) > 3
    full = weights_of(engine)
    for bucket in engine.weight_buckets(dtype="bfloat16"):
        for name, tensor in bucket:
            assert tensor.dtype == torch.bfloat16
            assert tensor.is_contiguous()
            assert torch.equal(tensor, full[name].bfloat16())


def test_a_rank_that_sends_no_weights_copies_none_from_its_device(tmp_path: Path, monkeypatch) -> None:
    engine, devices = engine_of(str(write_llama(tmp_path / "model", tie=True)), SHARED), []
    gather = engine._checkpoint
    monkeypatch.setattr(engine, "_device", torch.device("meta"))
    monkeypatch.setattr(engine, "_checkpoint", lambda *arguments: (devices.append(one[1].device) for one in gather(*arguments)))
    engine.join_weights("bfloat16")
    assert {device.type for device in devices} == {"meta"}


def test_an_exported_policy_and_critic_load_again_and_score_the_same(tmp_path: Path) -> None:
    model = "builtin:tiny?layers=2&hidden=64"
    sequences = random_sequences(4, vocabulary=90)
    batch = random_batch(sequences)
    for heads, outputs, lora in (
        (SHARED, frozenset({"logprobs", "values"}), LoraSection(rank=2)),
        (CRITIC, frozenset({"values"}), None),
    ):
        folder = tmp_path / "-".join(sorted(heads))
        engine = engine_of(model, heads, lora=lora, learning_rate=0.1)
        engine.update(batch, one_step(4), BOTH if heads == SHARED else ValueObjective())
        engine.export(folder)
        again = engine_of(str(folder), heads)
        for first, second in zip(engine.score(sequences, outputs), again.score(sequences, outputs), strict=True):
            for name in outputs:
                np.testing.assert_allclose(getattr(first, name), getattr(second, name), rtol=0, atol=2e-5)
        assert (folder / "tokenizer.json").is_file()
        assert "{%" in (folder / "chat_template.jinja").read_text()
        assert not list(tmp_path.glob("*.partial*"))


def test_gradient_checkpointing_changes_no_gradient(llama: str) -> None:
    batch = random_batch(random_sequences(4))
    weights = []
    for checkpointing in (False, True):
        model = ModelSection(path=llama, dtype="float32", gradient_checkpointing=checkpointing)
        train = TrainSection(optimizer=OptimizerSection(name="sgd"))
        engine = TrainEngine(TrainEngineSpec(model=model, heads=SHARED, train=train, learning_rate=1.0))
        engine.update(batch, one_step(4), BOTH)
        weights.append(all_weights(engine))
    assert largest_difference(*weights) < 1e-6


def test_bfloat16_trains_float32_masters_and_its_reference_agrees_exactly(llama: str) -> None:
    model = ModelSection(path=llama, dtype="bfloat16")
    engine = TrainEngine(TrainEngineSpec(model=model, heads=POLICY, train=TrainSection(), learning_rate=1e-3))
    sequences = random_sequences(4)
    for first, second in zip(
        engine.score(sequences, LOGPROBS), FrozenEngine(model, 8192).score(sequences, LOGPROBS), strict=True
    ):
        assert np.array_equal(first.logprobs, second.logprobs)
    exact = FrozenEngine(ModelSection(path=llama, dtype="float32"), 8192).score(sequences, LOGPROBS)
    gap = max(
        float(np.abs(a.logprobs - b.logprobs).max()) for a, b in zip(engine.score(sequences, LOGPROBS), exact, strict=True)
    )
    assert 0.0 < gap < 0.2
    before = all_weights(engine)
    engine.update(random_batch(sequences), one_step(4), PolicyObjective())
    after = all_weights(engine)
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    assert largest_difference(before, after) > 0.0


def test_right_padding_needs_no_mask(llama: str) -> None:
    network = build_network(ModelSection(path=llama, dtype="float32"), POLICY, "zero", 0)
    short, long = TokenSequence(np.arange(9, dtype=np.int32), 3), TokenSequence(np.arange(20, dtype=np.int32), 3)
    padded = torch.zeros(2, 20, dtype=torch.int64)
    padded[0, :9], padded[1] = torch.arange(9), torch.arange(20)
    mask = torch.zeros_like(padded)
    mask[0, :9], mask[1] = 1, 1
    logits = network.model(input_ids=padded, attention_mask=mask).logits.log_softmax(-1)
    expected = logits[0, 2:8].gather(-1, padded[0, 3:9, None]).squeeze(-1)
    positions = Positions(torch.arange(2, 8), padded[0, 3:9], torch.arange(0), [9, 20])
    found = network(padded, positions, LOGPROBS).logprobs
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert short.response_length == 6
    assert long.response_length == 17
