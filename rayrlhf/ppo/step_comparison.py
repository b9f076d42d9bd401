"""Comparison of an executed step with its record: bits, tolerance, and the first difference. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.records import SEGMENT_STRIDE, Rollout
from rayrlhf.data.seeds import sample_seed
from rayrlhf.observe.flight_record import Rows, StepRecord
from rayrlhf.ppo.executed_step import (
    EXPERIENCE,
    SCORE,
    ExecutedStep,
    Weights,
    experience_rows,
    optimizer_steps,
    plain_plan,
)
from rayrlhf.ppo.scoring import ScoredRollouts

Phase = Literal["record", "score", "experience", "update", "sync"]
Verdict = Literal["equal bit for bit", "within tolerance", "different"]
TIMES = ("time", "speed/", "sync/seconds", "ledger/issued")
"""Beginnings of the names of metrics that no replay repeats."""
PLACED = ("weights_checksum", "tokens/computed", "tokens/shared_fraction")
"""Ends of the names of metrics that depend on the number of processes by more than rounding."""
ENGINE = "log-probs of the rollout engine"
"""Item whose two sides come from different programs, so that they never agree in all bits."""


class Compared(NamedTuple):
    """The comparison of one tensor, decision or number.

    Attributes:
        item: its name.
        where: the extent of the comparison, or the first difference.
    """

    phase: Phase
    item: str
    verdict: Verdict
    where: str


class _Difference(NamedTuple):
    place: str
    recorded: object
    replayed: object


def compare_inputs(config: PPOConfig, record: StepRecord, scored: ScoredRollouts) -> list[Compared]:
    """Check seeds, masks and scores of recorded rollouts, without a model."""
    rollouts = scored.rollouts
    seeds = [
        _Difference(_sample(rollouts, row), rollout.seed, seed)
        for row, rollout in enumerate(rollouts)
        if rollout.key.sample < SEGMENT_STRIDE and rollout.seed != (seed := sample_seed(config.run.seed, *rollout.key))
    ]
    rows = {rollout.key: row for row, rollout in reversed([*enumerate(rollouts)])}
    again = [(row, rows[rollout.key]) for row, rollout in enumerate(rollouts) if rows[rollout.key] != row]
    twice = [_Difference(_sample(rollouts, row), f"as row {first}", "once") for row, first in again]
    plain = config.environment is None
    masks = [
        _Difference(f"{_sample(rollouts, row)}, token {int(wrong.argmax())}", False, True)
        for row, rollout in enumerate(rollouts)
        if (wrong := ~rollout.action_mask & (plain | (rollout.logprobs != 0))).any()
    ]
    return [
        _judged("record", "sampling seeds", seeds, len(rollouts)),
        _judged("record", "samples", twice, len(rollouts)),
        _judged("record", "action mask", masks, len(rollouts)),
        *_scores(config, scored),
    ]


def compare_scores(
    config: PPOConfig, record: StepRecord, scored: ScoredRollouts, tolerance: float, rescored: ScoredRollouts
) -> list[Compared]:
    """Compare outputs of the models, and the policy with the rollout engine."""
    found = []
    for name, rows in sorted(record.under(SCORE).items()):
        model, _, output = name.partition("/")
        again = [getattr(row, output) for row in rescored.forward_passes.get(model, ())]
        found.append(
            compare_rows("score", f"{model} {output}", rows[: len(scored.rollouts)], again, scored.rollouts, tolerance)
        )
    return [*found, *_engine(config, record, rescored, 10 * tolerance)]


def compare_experience(record: StepRecord, executed: ExecutedStep, tolerance: float) -> list[Compared]:
    """Compare the training batch and the samples of each optimizer step."""
    rollouts, arrays = executed.scored.rollouts, executed.experience.batch.arrays
    found = []
    for name, rows in sorted(record.under(EXPERIENCE).items()):
        again = experience_rows(executed, name) if name in arrays else []
        found.append(compare_rows("experience", name, rows[: len(rollouts)], again, rollouts, tolerance))
    if "plan" in record.header:
        before, after = record.header["plan"], plain_plan(executed.plan)
        steps = [(epoch, step) for epoch in range(max(len(before), len(after))) for step in range(_most(before, after, epoch))]
        wrong = [
            _Difference(f"epoch {epoch + 1}, optimizer step {step + 1}", one, other)
            for epoch, step in steps
            if (one := _at(before, epoch, step)) != (other := _at(after, epoch, step))
        ]
        found.append(_judged("experience", "samples of the optimizer steps", wrong, len(steps)))
    return found


def compare_update(record: StepRecord, executed: ExecutedStep, tolerance: float) -> list[Compared]:
    """Compare the results of each optimizer step, and the weights before and after."""
    version = int(record.header["version"])
    wrong = [_Difference("the step", version, executed.version)] if version != executed.version else []
    found = [_judged("update", "weight version", wrong, 1)]
    found += compare_weights("weights before the update", record.header.get("before"), executed.before)
    for role, steps in record.header.get("updates", {}).items():
        again = optimizer_steps(executed.reports[role]) if role in executed.reports else []
        if len(again) != len(steps):
            found.append(
                Compared("update", f"{role} optimizer steps", "different", f"{len(steps)} recorded, {len(again)} replayed")
            )
        for number, (one, other) in enumerate(zip(steps, again, strict=False), 1):
            found += compare_numbers("update", one, other, tolerance, f"{role} optimizer step {number}")
    return [*found, *compare_weights("weights after the update", record.header.get("after"), executed.after)]


def compare_samples(
    record: StepRecord, rollouts: Sequence[Rollout], again: Sequence[Rollout], tolerance: float, *, exact: bool
) -> list[Compared]:
    """Compare recorded responses with those that replicas sampled again from the same weights and seeds.

    If batches are `exact`, every token must be the same. Elsewhere rounding may turn a token into another one: log-probs are
    compared up to there.
    """
    known = {one.key: one for one in rollouts}
    pairs = [(known[other.key], other) for other in sorted(again, key=lambda one: one.key)]
    recorded = [one for one, _ in pairs]
    wrong, common, version = [], [], int(record.header["version"])
    for row, (one, other) in enumerate(pairs):
        shorter = min(len(one.response_ids), len(other.response_ids))
        differs = one.response_ids[:shorter] != other.response_ids[:shorter]
        common.append(int(differs.argmax()) if differs.any() else shorter)
        if differs.any() or len(one.response_ids) != len(other.response_ids):
            ids = [rollout.response_ids[common[-1] :][:1].tolist() or "its end" for rollout in (one, other)]
            wrong.append(_Difference(f"{_sample(recorded, row)}, token {common[-1]}", *ids))
    stale = [
        _Difference(_sample(recorded, row), version, int(other.versions.max()))
        for row, (_, other) in enumerate(pairs)
        if (np.maximum(other.versions, 0) != version).any()
    ]
    tokens = _judged("sync", "responses sampled again", wrong, len(pairs))
    if wrong and not exact:
        tokens = tokens._replace(verdict="within tolerance")
    before, after = (
        [rollout.logprobs[:length] for rollout, length in zip(side, common, strict=True)]
        for side in (recorded, [other for _, other in pairs])
    )
    return [
        _judged("sync", "weight version of the replicas", stale, len(pairs)),
        tokens,
        compare_rows("sync", "log-probs sampled again", before, after, recorded, tolerance),
    ]


def compare_weights(item: str, recorded: Weights | None, replayed: Weights) -> Iterator[Compared]:
    """Compare checksums of parameters, where both are known."""
    for role, parts in (recorded or {}).items():
        again = replayed.get(role, {})
        if again:
            wrong = [_Difference(name, value, again.get(name)) for name, value in parts.items() if again.get(name) != value]
            yield _judged("update", f"{role} {item}", wrong, len(parts))


def compare_numbers(
    phase: Phase, recorded: Mapping[str, float | None], replayed: Mapping[str, float], tolerance: float, item: str
) -> list[Compared]:
    """Compare numbers by name.

    One line is for those that are equal, and one for each other.

    Null counts as NaN, as in `metrics.jsonl`. Times are left out, and numbers that are on one side only.
    """
    names = [name for name in replayed if name in recorded and not name.startswith(TIMES)]
    found = []
    for name in names:
        one, other = recorded[name], float(replayed[name])
        one = float("nan") if one is None else float(one)
        if one == other or (np.isnan(one) and not np.isfinite(other)):
            continue
        verdict: Verdict = "within tolerance" if abs(one - other) <= tolerance * max(1.0, abs(one)) else "different"
        found.append(Compared(phase, f"{item}: {name}", verdict, f"{one!r} recorded, {other!r} replayed"))
    equal = len(names) - len(found)
    return ([Compared(phase, item, "equal bit for bit", f"{equal} numbers")] if equal else []) + found


def compare_rows(
    phase: Phase, item: str, recorded: Rows, replayed: Rows, rollouts: Sequence[Rollout], tolerance: float
) -> Compared:
    """Compare an array per sample, token by token."""
    if len(replayed) != len(recorded):
        return Compared(phase, item, "different", f"{len(recorded)} samples recorded, {len(replayed)} replayed")
    first: dict[bool, _Difference] = {}
    differing, total, largest = 0, 0, 0.0
    for row, (one, other) in enumerate(zip(recorded, replayed, strict=True)):
        if one is None or other is None or len(one) != len(other):
            if one is not other:
                lengths = ["none" if array is None else len(array) for array in (one, other)]
                return Compared(
                    phase, item, "different", f"{_sample(rollouts, row)}: {lengths[0]} tokens, replayed {lengths[1]}"
                )
            continue
        total += len(one)
        wrong = (one != other) & ~((one != one) & (other != other))
        if not wrong.any():
            continue
        differing += int(wrong.sum())
        gap = np.abs(one.astype(np.float64) - other.astype(np.float64))
        largest = max(largest, float(gap[np.isfinite(gap)].max(initial=0.0)))
        for beyond, where in ((True, wrong & ~(gap <= tolerance * np.maximum(1.0, np.abs(one)))), (False, wrong)):
            if where.any():
                token = int(where.argmax())
                place = f"{_sample(rollouts, row)}, token {token}"
                first.setdefault(beyond, _Difference(place, one[token].item(), other[token].item()))
    if not first:
        return Compared(phase, item, "equal bit for bit", f"{total} tokens of {len(recorded)} samples")
    verdict: Verdict = "different" if True in first else "within tolerance"
    size = f"{differing} of {total} tokens differ, by at most {largest:.3g}"
    return Compared(phase, item, verdict, f"{_first(first.get(True, first[False]))}; {size}")


def _scores(config: PPOConfig, scored: ScoredRollouts) -> list[Compared]:
    """Compare scores with the weighted sum of their parts, where functions alone give them."""
    parts, weights = scored.rewards.parts, {function.name: function.weight for function in config.reward.functions}
    if config.reward.model is not None or not parts or set(parts) != set(weights):
        return []
    sums = sum(weights[name] * np.nan_to_num(parts[name].astype(np.float64)) for name in parts)
    wrong = np.abs(sums - scored.rewards.scores) > 1e-5 * np.maximum(1.0, np.abs(sums))
    places = [
        _Difference(_sample(scored.rollouts, int(row)), float(scored.rewards.scores[row]), float(np.asarray(sums)[row]))
        for row in np.flatnonzero(wrong)
    ]
    return [_judged("record", "scores as sums of their parts", places, len(scored.rollouts))]


def _engine(config: PPOConfig, record: StepRecord, scored: ScoredRollouts, limit: float) -> list[Compared]:
    """Compare log-probs of policy and rollout engine by their mean distance in nats."""
    scores, version = scored.forward_passes.get("policy"), int(record.header["version"])
    if scores is None or scores[0].logprobs is None or config.trains_without_demonstrations:
        return []
    wrong, gaps = [], [np.zeros(0)]
    for row, (rollout, score) in enumerate(zip(scored.rollouts, scores, strict=True)):
        fresh = rollout.action_mask & (np.maximum(rollout.versions, 0) == version)
        if rollout.constrained is not None:
            fresh &= ~rollout.constrained
        gap = np.where(fresh, np.abs(rollout.logprobs - np.asarray(score.logprobs)), 0.0)
        gaps.append(gap[fresh])
        if gap.max(initial=0.0) > limit:
            token = int(gap.argmax())
            place = f"{_sample(scored.rollouts, row)}, token {token}"
            wrong.append(_Difference(place, rollout.logprobs[token].item(), np.asarray(score.logprobs)[token].item()))
    together = np.concatenate(gaps)
    if not len(together):
        return []
    apart = float(together.mean())
    verdict: Verdict = "different" if apart > limit else "within tolerance"
    text = f"{apart:.3g} nats apart on average over {len(together)} tokens"
    return [Compared("score", ENGINE, verdict, f"{_first(wrong[0])}; {text}" if apart > limit else text)]


def _judged(phase: Phase, item: str, wrong: Sequence[_Difference], count: int) -> Compared:
    if not wrong:
        return Compared(phase, item, "equal bit for bit", str(count))
    return Compared(phase, item, "different", f"{_first(wrong[0])}; {len(wrong)} of {count} differ")


def _first(difference: _Difference) -> str:
    return f"first at {difference.place}: {difference.recorded} recorded, {difference.replayed} replayed"


def _sample(rollouts: Sequence[Rollout], row: int) -> str:
    key = rollouts[row].key
    return f"row {row} (prompt {key.prompt}, sample {key.sample})"


def _at(plan: Any, epoch: int, step: int) -> Any:
    return plan[epoch][step] if epoch < len(plan) and step < len(plan[epoch]) else None


def _most(one: Any, other: Any, epoch: int) -> int:
    return max(len(plan[epoch]) if epoch < len(plan) else 0 for plan in (one, other))
