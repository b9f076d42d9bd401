"""Witness of the prompt stream: each prompt is used once per pass. Pure.

This also holds after losses and resumes. It keeps only two numbers: the count of used prompts, and the sum of their hashes,
which does not depend on their order. Both must equal those of the stream up to its cursor without the outstanding prompts.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from rayrlhf.data.prompt_sampler import PromptSampler
from rayrlhf.errors import AlarmError

_BITS = 2**64


class Tally(NamedTuple):
    """Number of prompts, and the sum of their hashes modulo 2**64."""

    prompts: int = 0
    digest: int = 0

    def plus(self, ids: Iterable[int]) -> "Tally":
        """Return the tally with further prompts."""
        hashes = [xxh3_64_intdigest(prompt.to_bytes(8, "little", signed=True)) for prompt in ids]
        return Tally(self.prompts + len(hashes), (self.digest + sum(hashes)) % _BITS)

    def minus(self, other: "Tally") -> "Tally":
        """Return the tally without those of another one."""
        return Tally(self.prompts - other.prompts, (self.digest - other.digest) % _BITS)

    def times(self, passes: int) -> "Tally":
        """Return the tally of so many passes."""
        return Tally(self.prompts * passes, self.digest * passes % _BITS)


class StreamWitness:
    """Checks the prompts of a run against its sampler's stream."""

    def __init__(self, sampler: PromptSampler) -> None:
        self._sampler = sampler
        self._used = Tally()
        self._drawn = Tally()

    def check(self, step: int, ids: Iterable[int], *, strict: bool = True) -> None:
        """Enter the prompts of a step, which the sampler counts as consumed by now.

        Args:
            step: PPO steps done with it.
            strict: False for a loop of one's own, which may use prompts by itself.

        Raises:
            AlarmError: a prompt of the stream was left out, or used twice.
        """
        self._used = self._used.plus(ids)
        expected = self._expected()
        if not strict:
            self._used = expected
        if self._used != expected:
            raise AlarmError(
                f"step {step}: {self._used.prompts} prompts were used so far, and the stream had {expected.prompts} for them"
                f"{', other ones' if self._used.prompts == expected.prompts else ''}: one was lost, or used twice in a pass"
            )

    def state(self) -> dict[str, int]:
        """Return the state for a checkpoint."""
        return self._used._asdict()

    def load_state(self, state: Mapping[str, int] | None) -> None:
        """Continue from a saved state, after the sampler.

        None, of a checkpoint of 0.1.0, takes the sampler's word up to here.
        """
        issued = self._sampler.issued
        passes, place = divmod(issued, self._sampler.size)
        whole = Tally().plus(self._sampler.order(0)).times(passes) if passes else Tally()
        part = Tally().plus(self._sampler.order(passes)[:place]) if place else Tally()
        self._drawn = Tally(whole.prompts + part.prompts, (whole.digest + part.digest) % _BITS)
        self._used = self._expected() if state is None else Tally(**state)

    def _expected(self) -> Tally:
        """Return the tally of the stream up to the sampler's cursor, without outstanding prompts."""
        sampler = self._sampler
        while self._drawn.prompts < sampler.issued:
            epoch, place = divmod(self._drawn.prompts, sampler.size)
            self._drawn = self._drawn.plus(sampler.order(epoch)[place : place + sampler.issued - self._drawn.prompts])
        return self._drawn.minus(Tally().plus(sampler.outstanding))
