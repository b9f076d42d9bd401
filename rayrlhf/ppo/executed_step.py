"""An executed step with all that entered its update, and its form as a record.

The driver hands every step to an observer: to the writer of records in a run, to the comparison in a replay.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from rayrlhf.actors.placement import TrainRole
from rayrlhf.data.records import Prompt, Rollout, RolloutRequest, SampleKey, TokenScores
from rayrlhf.engines.train.plan import UpdatePlan, UpdateReport
from rayrlhf.observe.flight_record import Column, StepRecord
from rayrlhf.ppo.experience import Experience
from rayrlhf.ppo.scoring import ScoredRollouts
from rayrlhf.rewards.score import RewardBatch

Weights = Mapping[TrainRole, Mapping[str, int]]
"""Checksum of each parameter, by learning role."""
SCORE, PART, EXPERIENCE = "score/", "reward/", "experience/"
"""Prefixes of columns: outputs of a model, parts of the reward, arrays of the training batch."""
COPIES = frozenset({"old_logprobs", "old_values", "ref_logprobs", "rollout_logprobs"})
"""Arrays of the training batch that repeat an output of a model."""
_OUTPUTS = ("logprobs", "values")


@dataclass(frozen=True, slots=True)
class ExecutedStep:
    """A step after its update.

    Attributes:
        step: steps done after it.
        version: weight version of the policy that the step began with.
        drawn: ids of the prompts in the order of the stream.
        replicas: rank of the replica that sampled each response, as far as known.
        state: of `ExperienceMaker` before the step: KL coefficient and running moments.
        scored: rollouts, rewards, and outputs of the models.
        experience: the training batch.
        plan: samples of each optimizer step.
        reports: of each learning role's update.
        before: weights before the update; empty if not asked for.
        after: weights after it.
        metrics: of the step, without times of phases.
    """

    step: int
    version: int
    drawn: Sequence[int]
    replicas: Mapping[SampleKey, int]
    state: Mapping[str, Any]
    scored: ScoredRollouts
    experience: Experience
    plan: UpdatePlan
    reports: Mapping[TrainRole, UpdateReport]
    before: Weights
    after: Weights
    metrics: Mapping[str, float]


class StepObserver(Protocol):
    """Receives every step after its update.

    Attributes:
        weights: the step must carry checksums of all weights.
    """

    @property
    def weights(self) -> bool: ...  # noqa: D102 - in the docstring of the class

    def __call__(self, executed: ExecutedStep) -> None:
        """Receive a step. Nothing in it may be changed."""


def to_record(executed: ExecutedStep, level: Literal["light", "full"]) -> StepRecord:
    """Return the record of a step.

    `full` adds the samples and results of each optimizer step, all arrays of the training batch, and the weights' checksums.
    """
    scored, greedy = executed.scored, executed.scored.greedy
    rollouts = [*scored.rollouts, *(greedy.rollouts if greedy else ())]
    rewards = [scored.rewards, *([greedy.rewards] if greedy else [])]
    extra = len(rollouts) - len(scored.rollouts)
    columns = _rollout_columns(rollouts, executed.replicas)
    columns["score"] = np.concatenate([batch.scores for batch in rewards])
    for name in scored.rewards.parts:
        columns[PART + name] = np.concatenate([batch.parts[name] for batch in rewards])
    optional: dict[str, list[Any]] = {
        "environment_rewards": [rollout.rewards for rollout in rollouts],
        "constrained": [rollout.constrained for rollout in rollouts],
        "token_rewards": [row for batch in rewards for row in batch.tokens or [None] * len(batch.scores)],
    }
    for name, scores in scored.forward_passes.items():
        for output in _OUTPUTS:
            optional[f"{SCORE}{name}/{output}"] = [getattr(row, output) for row in scores] + [None] * extra
    arrays = executed.experience.batch.arrays
    for name in sorted(set(arrays) - (COPIES if level == "light" else set())):
        optional[EXPERIENCE + name] = [*experience_rows(executed, name), *[None] * extra]
    columns |= {name: rows for name, rows in optional.items() if any(row is not None for row in rows)}
    return StepRecord(executed.step, _header(executed, level), columns)


def experience_rows(executed: ExecutedStep, name: str) -> list[Any]:
    """Return an array of the training batch by sample, with the slot after its tokens."""
    array = executed.experience.batch.arrays[name]
    return [row[: len(rollout.response_ids) + 1] for row, rollout in zip(array, executed.scored.rollouts, strict=True)]


def recorded_rollouts(record: StepRecord) -> ScoredRollouts:
    """Return the rollouts of a record, scored; texts are empty."""
    columns = record.columns
    rollouts: list[Rollout] = []
    for row in range(len(columns["prompt"])):
        ids = columns["prompt_ids"][row]
        rollouts.append(_rollout(record, row, rollouts[-1].prompt_ids if ids is None else ids))
    count = int(record.header["samples"])
    rewards = _rewards(record, slice(0, count))
    passes: dict[str, dict[str, Any]] = {}
    for path, rows in record.under(SCORE).items():
        name, _, output = path.partition("/")
        passes.setdefault(name, {})[output] = rows
    scores = {
        name: [TokenScores(**{output: rows[row] for output, rows in outputs.items()}) for row in range(count)]
        for name, outputs in passes.items()
    }
    prompts = {rollout.key.prompt: Prompt(rollout.key.prompt, "", rollout.prompt_ids) for rollout in rollouts}
    scored = ScoredRollouts(tuple(rollouts[:count]), rewards, scores, prompts)
    if len(rollouts) == count:
        return scored
    rest = ScoredRollouts(tuple(rollouts[count:]), _rewards(record, slice(count, len(rollouts))), {}, prompts)
    return replace(scored, greedy=rest)


def sampled_again(record: StepRecord, rollouts: Sequence[Rollout]) -> list[RolloutRequest]:
    """Return the requests of responses that the step's first weights sampled whole.

    They are in the order of the stream.
    """
    place = {prompt: number for number, prompt in enumerate(record.header["drawn"])}
    whole = [one for one in rollouts if (np.maximum(one.versions, 0) == record.header["version"]).all()]
    whole.sort(key=lambda one: (place.get(one.key.prompt, len(place)), one.key.sample))
    return [RolloutRequest(one.key, one.prompt_ids, one.seed) for one in whole]


def _rollout_columns(rollouts: Sequence[Rollout], replicas: Mapping[SampleKey, int]) -> dict[str, Column]:
    """Return the columns of rollouts; a prompt that repeats the row before is left out."""
    before = [None, *(rollout.prompt_ids for rollout in rollouts)]
    columns: dict[str, Column] = {
        "prompt": np.array([rollout.key.prompt for rollout in rollouts]),
        "sample": np.array([rollout.key.sample for rollout in rollouts]),
        "seed": np.array([rollout.seed for rollout in rollouts]),
        "stopped": np.array([rollout.finish_reason == "stop" for rollout in rollouts]),
        "replica": np.array([replicas.get(rollout.key, -1) for rollout in rollouts], np.int32),
        "prompt_ids": [
            None if last is not None and np.array_equal(last, rollout.prompt_ids) else rollout.prompt_ids
            for rollout, last in zip(rollouts, before[:-1], strict=True)
        ],
        "response_ids": [rollout.response_ids for rollout in rollouts],
        "logprobs": [rollout.logprobs for rollout in rollouts],
        "action_mask": [rollout.action_mask for rollout in rollouts],
        "versions": [rollout.versions for rollout in rollouts],
    }
    if len({rollout.key.step for rollout in rollouts}) > 1:
        columns["sampled_step"] = np.array([rollout.key.step for rollout in rollouts])
    if any(rollout.path for rollout in rollouts):
        columns["path"] = [rollout.path for rollout in rollouts]
    if any(rollout.read_tokens for rollout in rollouts):
        columns["read_tokens"] = np.array([rollout.read_tokens for rollout in rollouts], np.int32)
        columns["cached_tokens"] = np.array([rollout.cached_tokens for rollout in rollouts], np.int32)
    return columns


def _rollout(record: StepRecord, row: int, prompt_ids: Any) -> Rollout:
    columns: Mapping[str, Any] = record.columns

    def optional(name: str, default: Any) -> Any:
        return columns[name][row] if name in columns else default

    return Rollout(
        SampleKey(
            int(optional("sampled_step", record.header["sampled_step"])),
            int(columns["prompt"][row]),
            int(columns["sample"][row]),
        ),
        prompt_ids,
        columns["response_ids"][row],
        columns["action_mask"][row],
        columns["logprobs"][row],
        columns["versions"][row],
        "stop" if columns["stopped"][row] else "length",
        "",
        int(columns["seed"][row]),
        rewards=optional("environment_rewards", None),
        read_tokens=int(optional("read_tokens", 0)),
        cached_tokens=int(optional("cached_tokens", 0)),
        path=optional("path", ""),
        constrained=optional("constrained", None),
    )


def _rewards(record: StepRecord, rows: slice) -> RewardBatch:
    columns: Mapping[str, Any] = record.columns
    tokens = columns["token_rewards"][rows] if "token_rewards" in columns else None
    parts = {name: np.array(part[rows]) for name, part in record.under(PART).items()}
    return RewardBatch(np.array(columns["score"][rows]), parts, tokens)


def _header(executed: ExecutedStep, level: str) -> dict[str, Any]:
    rollouts = executed.scored.rollouts
    header: dict[str, Any] = {
        "level": level,
        "samples": len(rollouts),
        "sampled_step": rollouts[0].key.step,
        "version": executed.version,
        "drawn": list(executed.drawn),
        "state": executed.state,
    }
    if level == "full":
        header["plan"] = plain_plan(executed.plan)
        header["updates"] = {role: optimizer_steps(report) for role, report in executed.reports.items()}
        header["before"], header["after"] = executed.before, executed.after
    return header


def plain_plan(plan: UpdatePlan) -> list[list[list[int]]]:
    """Return the rows of each optimizer step of each epoch."""
    return [[[int(row) for row in rows] for rows in epoch] for epoch in plan.epochs]


def optimizer_steps(report: UpdateReport) -> list[dict[str, float]]:
    """Return the metrics, gradient norm and learning rate of each optimizer step of an update."""
    rows = zip(report.step_metrics, report.grad_norms, report.learning_rates, strict=False)
    return [dict(metrics) | {"grad_norm": norm, "lr": rate} for metrics, norm, rate in rows]
