"""Rewards of single responses, and their sums over the roles that compute them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rayrlhf.data.fingerprints import reward_seal
from rayrlhf.data.records import Float32, Rollout, SampleKey
from rayrlhf.errors import AlarmError, UserError
from rayrlhf.rewards.functions import JUDGE_PART
from rayrlhf.rewards.judgments import SILENT
from rayrlhf.rewards.score import RewardBatch


class RewardRow(NamedTuple):
    """A response's score, its parts, the share of single tokens, and its seal (see `RewardBatch`)."""

    score: float
    parts: dict[str, float]
    tokens: Float32 | None = None
    seal: int | None = None


def reward_rows(batch: RewardBatch) -> list[RewardRow]:
    """Return the rewards of a batch one by one."""
    return [
        RewardRow(
            float(score),
            {name: float(values[index]) for name, values in batch.parts.items()},
            None if batch.tokens is None else batch.tokens[index],
            None if batch.seals is None else batch.seals[index],
        )
        for index, score in enumerate(batch.scores)
    ]


def merged_rows(rows: Sequence[RewardRow]) -> RewardBatch:
    """Return rewards as a batch."""
    names = rows[0].parts if rows else {}
    seals = [row.seal for row in rows if row.seal is not None]
    return RewardBatch(
        np.array([row.score for row in rows], dtype=np.float32),
        {name: np.array([row.parts[name] for row in rows], dtype=np.float32) for name in names},
        [row.tokens for row in rows] if any(row.tokens is not None for row in rows) else None,
        seals if len(seals) == len(rows) else None,
    )


def add_judgments(
    rollouts: Sequence[Rollout], judged: Mapping[SampleKey, RewardRow], computed: Mapping[SampleKey, RewardRow] | None
) -> dict[SampleKey, RewardRow]:
    """Return the sums of the judge's rewards and those of the reward actors, if any.

    Raises:
        UserError: the judge gave none of at least `SILENT` responses a score, or no reward applies to some sample.
        AlarmError: a reward was computed for another sample.
    """
    if len(rollouts) >= SILENT and all(np.isnan(judged[rollout.key].parts[JUDGE_PART]) for rollout in rollouts):
        raise UserError(
            f"reward.judge: no score for any of {len(rollouts)} responses; expected a label after the question "
            "(reward.judge.min_mass), or a match of reward.judge.verdict"
        )
    sums = {}
    for rollout in rollouts:
        key = rollout.key
        rows = [judged[key]] if computed is None else [computed[key], judged[key]]
        for row in rows:
            if row.seal is not None and row.seal != reward_seal(rollout, row.score, row.tokens):
                raise AlarmError(
                    f"step {key.step + 1}: sample {key.sample} of prompt {key.prompt} has the reward {row.score:g}, which was "
                    "computed for another one; its update was not kept"
                )
        parts = {name: value for row in rows for name, value in row.parts.items()}
        if all(np.isnan(value) for value in parts.values()):
            raise UserError(
                f"no reward applies to sample {key.sample} of prompt {key.prompt}: all of {', '.join(parts)} gave none"
            )
        score, tokens = float(np.float32(sum(row.score for row in rows))), rows[0].tokens
        sums[key] = RewardRow(score, parts, tokens, reward_seal(rollout, score, tokens))
    return sums
