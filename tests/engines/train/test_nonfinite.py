"""A gradient with inf or NaN never reaches the weights, and the error names role, sample and token."""

import math
from typing import Any

import numpy as np
import pytest

from rayrlhf.config.algorithm import ParitySection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.train import TrainSection
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.policy import PolicyObjective, ValueObjective
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.errors import AlarmError
from tests.engines.training import join_alone, random_batch, random_sequences, weights_of, write_llama

POLICY, CRITIC = frozenset({"lm"}), frozenset({"value"})
PLAN = UpdatePlan([[[0, 1, 2, 3]]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    join_alone()
    return str(write_llama(tmp_path_factory.mktemp("model") / "llama"))


def engine_of(path: str, heads: frozenset[Any], parity: ParitySection | None = None, **settings: Any) -> TrainEngine:
    model, train = ModelSection(path=path, dtype="float32"), TrainSection(learning_rate=0.1, micro_batch_size=2, **settings)
    spec = TrainEngineSpec(model, heads, train, 0.1, head_init="normal", parity=parity or ParitySection())
    return TrainEngine(spec)


def first_token(batch: TrainingBatch) -> int:
    return int(np.flatnonzero(batch.arrays["action_mask"][2])[0])


def spoiled(batch: TrainingBatch, name: str, value: float) -> TrainingBatch:
    """The batch with one value replaced at the first token that sample 2 learns."""
    array = batch.arrays[name].copy()
    array[2, first_token(batch)] = value
    return TrainingBatch(batch.sequences, {**batch.arrays, name: array})


def largest_difference(left: dict[str, Any], right: dict[str, Any]) -> float:
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize(
    ("heads", "name", "value"),
    [
        (POLICY, "advantages", math.nan),
        (POLICY, "advantages", math.inf),
        (POLICY, "old_logprobs", math.nan),
        (CRITIC, "returns", math.inf),
        (CRITIC, "old_values", math.nan),
    ],
)
def test_a_nonfinite_input_moves_no_weight_and_the_next_step_learns(llama, stage, heads, name, value):
    engine = engine_of(llama, heads, zero_stage=stage)
    objective = PolicyObjective() if heads == POLICY else ValueObjective()
    batch = random_batch(random_sequences(4))
    before = weights_of(engine)
    report = engine.update(spoiled(batch, name, value), PLAN, objective)
    assert report.skipped_steps == 1
    assert largest_difference(weights_of(engine), before) == 0.0
    assert engine.update(batch, PLAN, objective).skipped_steps == 0
    moved = weights_of(engine)
    assert largest_difference(moved, before) > 0.0
    assert all(bool(tensor.isfinite().all()) for tensor in moved.values())


def test_too_many_such_steps_in_a_row_stop_the_run_and_name_the_value(llama):
    engine = engine_of(llama, POLICY, max_nonfinite_steps=1)
    batch = spoiled(random_batch(random_sequences(4)), "advantages", math.nan)
    engine.update(batch, PLAN, PolicyObjective())
    wanted = rf"^policy: .* 2 optimizer steps in a row.* sample 2, token {first_token(batch)}, advantages\."
    with pytest.raises(AlarmError, match=wanted):
        engine.update(batch, PLAN, PolicyObjective())


def test_means_of_micro_batches_do_not_count_a_filler_and_count_what_the_guard_left_out(llama):
    batch = random_batch(random_sequences(4))
    exploded = TrainingBatch(batch.sequences, {**batch.arrays, "old_logprobs": batch.arrays["old_logprobs"] - np.float32(5.0)})
    engine = engine_of(llama, POLICY, ParitySection(mini_batch_means=True), ratio_guard=10.0)
    before = weights_of(engine)
    assert engine.update(exploded, PLAN, PolicyObjective()).guarded_steps == 2
    assert largest_difference(weights_of(engine), before) == 0.0
