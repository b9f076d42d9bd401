"""Takes the groups of a step that finish first (`rollout.overissue`). Pure."""

from collections.abc import Iterable, Iterator

from rayrlhf.data.records import Rollout


class WholeGroups:
    """Collects finished groups until a step is full.

    A group is the responses to one prompt from one draw of the stream, as in `GroupFilter`.

    Args:
        prompts: groups that the step needs.
        samples_per_prompt: responses of a group.
    """

    def __init__(self, prompts: int, samples_per_prompt: int) -> None:
        self._missing, self._samples = prompts, samples_per_prompt
        self._begun: dict[tuple[int, int], list[Rollout]] = {}

    def take(self, batches: Iterable[list[Rollout]]) -> Iterator[list[Rollout]]:
        """Yield the rollouts of each group that is whole, until the step is full.

        Failed ones finish a group too.
        """
        for batch in batches:
            whole: list[Rollout] = []
            for rollout in batch:
                name = rollout.key.prompt, rollout.key.sample // self._samples
                group = self._begun.setdefault(name, [])
                group.append(rollout)
                if len(group) == self._samples and self._missing:
                    self._missing -= 1
                    whole += self._begun.pop(name)
            if whole:
                yield whole
            if not self._missing:
                return

    @property
    def rest(self) -> list[Rollout]:
        """The other rollouts: of groups that are not whole, or came too late."""
        return [rollout for group in self._begun.values() for rollout in group]
