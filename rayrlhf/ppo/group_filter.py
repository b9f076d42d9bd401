"""Replaces zero-variance groups of a step (DAPO, Yu et al. 2025, section 3.2). Pure.

Responses to one prompt with equal scores have advantage 0 in every group estimator: the prompt is too easy or too hard at
present. The next prompts of the stream replace such prompts until the step is full or the rounds are used up. Zero-variance
groups then fill the step, so that its size never changes. Prompts left out count as used, like those trained on.
"""

from collections.abc import Mapping, Sequence

from rayrlhf.data.records import SEGMENT_STRIDE, Rollout, SampleKey
from rayrlhf.observe.metric_names import SAMPLED_TOKENS


class GroupFilter:
    """Collects the groups of a step, round after round.

    A group is the responses to one prompt from one draw of the stream; a prompt that was drawn twice has two groups.

    Args:
        prompts: groups that the step needs.
        samples_per_prompt: responses of a group.
        rounds: rounds after the first in which groups may be replaced.
    """

    def __init__(self, prompts: int, samples_per_prompt: int, rounds: int) -> None:
        self._prompts = prompts
        self._samples = samples_per_prompt
        self._rounds_left = rounds + 1
        self._with_signal: list[list[Rollout]] = []
        self._zero_variance: list[list[Rollout]] = []
        self._tokens = 0

    @property
    def missing(self) -> int:
        """Prompts to sample in the next round; 0 when the step is full."""
        return self._prompts - len(self._with_signal) if self._rounds_left else 0

    def add(self, rollouts: Sequence[Rollout], scores: Mapping[SampleKey, float]) -> None:
        """Add a round: all responses to the prompts that were missing, and their scores."""
        self._rounds_left -= 1
        self._tokens += sum(len(rollout.response_ids) for rollout in rollouts)
        groups: dict[tuple[int, int], list[Rollout]] = {}
        for rollout in rollouts:
            groups.setdefault((rollout.key.prompt, rollout.key.sample % SEGMENT_STRIDE // self._samples), []).append(rollout)
        for group in groups.values():
            has_signal = len({scores[rollout.key] for rollout in group}) > 1
            (self._with_signal if has_signal else self._zero_variance).append(group)

    def rollouts(self) -> list[Rollout]:
        """Return the responses of the step: groups with signal, filled up with zero-variance groups."""
        fill = self._zero_variance[: self._filled]
        return [rollout for group in [*self._with_signal, *fill] for rollout in group]

    def left_out(self) -> list[Rollout]:
        """Return the other responses, which are of zero-variance groups."""
        return [rollout for group in self._zero_variance[self._filled :] for rollout in group]

    @property
    def _filled(self) -> int:
        return self._prompts - len(self._with_signal)

    def metrics(self) -> dict[str, float]:
        """Return the number of groups sampled and left out, and the response tokens of all."""
        sampled = len(self._with_signal) + len(self._zero_variance)
        return {
            "sampling/prompts": float(sampled),
            "sampling/prompts_left_out": float(sampled - self._prompts),
            SAMPLED_TOKENS: float(self._tokens),
        }
