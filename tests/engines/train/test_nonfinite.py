"""A gradient with inf or NaN never reaches the weights, and the error names role, sample and token."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from rayrlhf.config.algorithm import KlSection, ParitySection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.train import TrainSection
from rayrlhf.data.supervised.supervised_samples import DistillationSample
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.base import Objective
from rayrlhf.engines.objectives.policy import PolicyObjective, SharedObjective, ValueObjective
from rayrlhf.engines.objectives.preference import DirectPreferenceObjective, PreferenceObjective, UnpairedPreferenceObjective
from rayrlhf.engines.objectives.supervised import CrossEntropyObjective, DistillationObjective
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.engines.train.supervised_batches import (
    IDS,
    LOGPROBS,
    direct_preference_batch,
    distillation_batch,
    preference_batch,
    supervised_batch,
    unpaired_batch,
)
from rayrlhf.errors import AlarmError
from rayrlhf.models.network_io import Head
from tests.engines.train.test_tuning_oracle import random_pairs, random_samples
from tests.engines.training import random_batch, random_sequences, weights_of

Heads = frozenset[Head]
POLICY, CRITIC = Heads({"lm"}), Heads({"value"})
PLAN = UpdatePlan([[[0, 1, 2, 3]]])

pytestmark = pytest.mark.usefixtures("alone")


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


PAIRS = random_pairs(2, margins=True)
LABELED = [replace(pair, label=index % 2 == 0) for index, pair in enumerate(random_pairs(4))]


def distillation() -> TrainingBatch:
    generator = np.random.default_rng(0)
    samples = [
        DistillationSample(
            sample.token_ids,
            sample.loss_mask,
            sample.row,
            {
                IDS: np.tile(generator.permutation(61)[:3].astype(np.int32), (sample.loss_mask.sum(), 1)),
                LOGPROBS: np.log(np.tile(np.float32([0.5, 0.2, 0.2, 0.1]), (sample.loss_mask.sum(), 1))),
            },
        )
        for sample in random_samples(4)
    ]
    return distillation_batch(samples)


KL = PolicyObjective(kl=KlSection(placement="loss", coefficient=0.1), importance=True)
SHARED = SharedObjective(PolicyObjective(), ValueObjective())
TRAINERS: dict[str, tuple[str, Heads, Objective, Callable[[], TrainingBatch]]] = {
    "policy": ("policy", POLICY, KL, lambda: random_batch(random_sequences(4))),
    "critic": ("critic", CRITIC, ValueObjective(), lambda: random_batch(random_sequences(4))),
    "shared": ("policy", Heads({"lm", "value"}), SHARED, lambda: random_batch(random_sequences(4))),
    "sft": ("model", POLICY, CrossEntropyObjective(), lambda: supervised_batch(random_samples(4))),
    "distillation": ("model", POLICY, DistillationObjective(), distillation),
    "reward": ("reward model", CRITIC, PreferenceObjective(0.01), lambda: preference_batch(PAIRS)),
    "dpo": ("model", POLICY, DirectPreferenceObjective(), lambda: direct_preference_batch(PAIRS)),
    "kto": ("model", POLICY, UnpairedPreferenceObjective(), lambda: unpaired_batch(LABELED, 0.5)),
}
"""Name -> role in errors, heads, objective, batch."""
INPUTS = {
    "policy": ["advantages", "old_logprobs", "ref_logprobs", "importance_weights"],
    "critic": ["returns", "old_values"],
    "shared": ["advantages", "old_logprobs", "returns", "old_values"],
    "distillation": ["teacher_logprobs"],
    "reward": ["margin"],
    "dpo": ["reference_logprob"],
    "kto": ["reference_logprob", "batch_kl"],
}
PLACES = [
    *((trainer, name) for trainer, names in INPUTS.items() for name in names),
    *((trainer, place) for trainer in TRAINERS for place in ("output", "loss", "gradient")),
    ("shared", "output of the value head"),
]
"""Every array that an objective reads, and what the network computes, for each way of training."""


@pytest.fixture(scope="module")
def engines(llama: str) -> Callable[[str], TrainEngine]:
    @cache
    def build(trainer: str) -> TrainEngine:
        role, heads, _, _ = TRAINERS[trainer]
        train = TrainSection(learning_rate=0.1, micro_batch_size=2, max_nonfinite_steps=0)
        model = ModelSection(path=llama, dtype="float32")
        return TrainEngine(TrainEngineSpec(model, heads, train, 0.1, role=role, head_init="normal", head_bias=False))

    return build


class Injection:
    """Writes one non-finite number into the first micro-batch of an update, and says where it is."""

    def __init__(self, engine: TrainEngine, place: str, value: float) -> None:
        self.rows: list[list[int]] = []
        self._engine, self._place, self._value = engine, place, value

    def __enter__(self) -> "Injection":
        updater, self._undo = self._engine._updater, pytest.MonkeyPatch()
        micro_batch, forward, backward = updater._micro_batch, updater._backend.forward, updater._backend.backward

        def noting(batch: Any, part: Any, *rest: Any, **named: Any) -> None:
            self.rows.append(list(part.rows))
            micro_batch(batch, part, *rest, **named)

        def spoiled_output(*inputs: Any) -> Any:
            output = forward(*inputs)
            if len(self.rows) == 1 and self._place.startswith("output"):
                names = ("values",) if "head" in self._place else ("logprobs", "divergence", "values")
                name = next(name for name in names if getattr(output, name, None) is not None)
                poison = torch.zeros_like(getattr(output, name))
                poison[0] = self._value
                output = output._replace(**{name: getattr(output, name) + poison})
            return output

        def spoiled_loss(loss: Any, *, last: bool) -> None:
            spoiled = self._place == "loss" and len(self.rows) == 1
            backward(loss * self._value if spoiled else loss, last=last)

        self._undo.setattr(updater, "_micro_batch", noting)
        self._undo.setattr(updater._backend, "forward", spoiled_output)
        self._undo.setattr(updater._backend, "backward", spoiled_loss)
        parameter = next(p for n, p in self._engine._network.named_parameters() if "v_head" not in n and p.requires_grad)
        self._hook = parameter.register_hook(lambda gradient: gradient * self._value if self._place == "gradient" else gradient)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.undo()
        self._hook.remove()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("trainer", "place"), PLACES)
def test_a_nonfinite_number_at_any_place_of_any_trainer_is_named_and_moves_no_weight(engines, trainer, place, value):
    role, _, objective, make = TRAINERS[trainer]
    engine, batch, clean = engines(trainer), make(), make()
    engine._updater._skipped_in_a_row = 0
    before = weights_of(engine)
    if place in batch.arrays:
        under = np.logical_or.reduce([batch.arrays[mask] for mask in objective.masks])
        token = 0 if batch.group_size == 2 else int(np.flatnonzero(under[2])[0])
        array = batch.arrays[place].copy()
        array[2, token] = value
        batch = TrainingBatch(batch.sequences, {**batch.arrays, place: array}, batch.group_size)
        where = rf"sample 2, token {token}, {place}\."
    plan = UpdatePlan([[list(range(len(batch)))]])
    with Injection(engine, place, value) as injection, pytest.raises(AlarmError) as raised:
        engine.update(batch, plan, objective)
    if place.startswith("output"):
        where = rf"sample {injection.rows[0][0]}, token \d+, (logprobs|divergence|values) of the network\."
    elif place in ("loss", "gradient"):
        where = r"in the backward pass of samples 0, 1, 2, 3\."
    assert re.match(rf"^{role}: gradient with inf or NaN in 1 optimizer steps in a row, .*{where}", str(raised.value))
    assert largest_difference(weights_of(engine), before) == 0.0
    assert engine.update(clean, plan, objective).skipped_steps == 0
    moved = weights_of(engine)
    assert all(bool(tensor.isfinite().all()) for tensor in moved.values())
    assert trainer in ("critic", "reward") or largest_difference(moved, before) > 0.0


def test_the_cause_that_the_driver_found_is_named_before_what_whitening_made_of_it(engines):
    batch = spoiled(random_batch(random_sequences(4)), "advantages", math.nan)
    batch = TrainingBatch(batch.sequences, batch.arrays, cause="sample 1 (prompt 7, sample 0), token 3, value of the critic")
    with pytest.raises(AlarmError, match=r"^policy: .* sample 1 \(prompt 7, sample 0\), token 3, value of the critic\."):
        engines("policy").update(batch, PLAN, KL)
