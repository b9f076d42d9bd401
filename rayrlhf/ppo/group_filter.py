"""Which prompts make up a step when those that teach nothing are left out (DAPO, Yu et al. 2025, section 3.2). Pure.

Responses to one prompt that all score the same have advantage 0 in every group estimator: the prompt is too easy or too hard
at present. Such prompts are replaced by the next ones of the stream until the step is full or the rounds are used up; then the
step is filled up with them, so that its size never changes. Prompts that were left out count as used, like those trained on.
"""

from collections.abc import Mapping, Sequence

from rayrlhf.data.records import STRETCH, Rollout, SampleKey

SAMPLED_TOKENS = "sampling/tokens"
"""Response tokens that a step sampled, those it left out included."""


class Harvest:
    """Collects the responses of a step, round after round.

    What is kept or left out is a draw: the responses that one handing-out of a prompt led to. A prompt that the stream handed
    out twice has two.

    Args:
        prompts: draws that the step needs.
        samples_per_prompt: responses of a draw.
        rounds: rounds after the first in which prompts may be replaced.
    """

    def __init__(self, prompts: int, samples_per_prompt: int, rounds: int) -> None:
        self._prompts = prompts
        self._samples = samples_per_prompt
        self._rounds_left = rounds + 1
        self._telling: list[list[Rollout]] = []
        self._flat: list[list[Rollout]] = []
        self._tokens = 0

    @property
    def missing(self) -> int:
        """Prompts to sample in the next round; 0 when the step is full."""
        return self._prompts - len(self._telling) if self._rounds_left else 0

    def add(self, rollouts: Sequence[Rollout], scores: Mapping[SampleKey, float]) -> None:
        """Take in a round: all responses to the prompts that were missing, and what each of them scored."""
        self._rounds_left -= 1
        self._tokens += sum(len(rollout.response_ids) for rollout in rollouts)
        draws: dict[tuple[int, int], list[Rollout]] = {}
        for rollout in rollouts:
            draws.setdefault((rollout.key.prompt, rollout.key.sample % STRETCH // self._samples), []).append(rollout)
        for draw in draws.values():
            telling = len({scores[rollout.key] for rollout in draw}) > 1
            (self._telling if telling else self._flat).append(draw)

    def rollouts(self) -> list[Rollout]:
        """The responses of the step: those of the draws that tell good from bad, then as many others as it takes."""
        fill = self._flat[: self._prompts - len(self._telling)]
        return [rollout for draw in [*self._telling, *fill] for rollout in draw]

    def metrics(self) -> dict[str, float]:
        """Draws sampled in the step, how many of them were left out, and the response tokens of all."""
        sampled = len(self._telling) + len(self._flat)
        return {
            "sampling/prompts": float(sampled),
            "sampling/prompts_left_out": float(sampled - self._prompts),
            SAMPLED_TOKENS: float(self._tokens),
        }
