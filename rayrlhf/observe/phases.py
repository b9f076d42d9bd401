"""Where a step's time goes: seconds, share of the step, and tokens per second of each phase.

Phases may overlap (scoring while others are still generated), so shares can add up to more than 1; the share that is in no phase
at all, `other`, is counted from the union of all spans and is what the driver itself costs.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """One stretch of a phase. `start` and `end` are seconds since the epoch, on a clock that does not jump."""

    name: str
    start: float
    end: float


class PhaseTimer:
    """Times the phases of one step after another."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start the first step; `clock` gives seconds."""
        self._clock = clock
        self._epoch = time.time() - clock()
        self._start_step()

    @contextmanager
    def phase(self, name: str, tokens: int = 0) -> Iterator[None]:
        """Time a block, also one that raises; blocks of one name add up within a step."""
        start = self._clock()
        try:
            yield
        finally:
            self._spans.append(Span(name, start + self._epoch, self._clock() + self._epoch))
            self._tokens[name] += tokens

    def add_tokens(self, name: str, tokens: int) -> None:
        """Count tokens that a phase worked on, where they are known only afterwards."""
        self._tokens[name] += tokens

    @property
    def spans(self) -> tuple[Span, ...]:
        """The current step's finished spans, for the trace."""
        return tuple(self._spans)

    def finish_step(self) -> dict[str, float]:
        """Close the step and start the next one.

        Returns:
            `time/step` and `time/PHASE` in seconds, `time_share/PHASE` and `time_share/other` in [0, 1] of the step, and
            `tokens_per_second/PHASE` for phases with tokens.
        """
        step_seconds = self._clock() - self._step_start
        metrics = {"time/step": step_seconds}
        seconds: defaultdict[str, float] = defaultdict(float)
        for span in self._spans:
            seconds[span.name] += span.end - span.start
        for name, total in seconds.items():
            metrics[f"time/{name}"] = total
            metrics[f"time_share/{name}"] = total / step_seconds if step_seconds else 0.0
            if self._tokens[name] and total:
                metrics[f"tokens_per_second/{name}"] = self._tokens[name] / total
        covered = _union_seconds(self._spans)
        metrics["time_share/other"] = max(0.0, 1.0 - covered / step_seconds) if step_seconds else 0.0
        self._start_step()
        return metrics

    def _start_step(self) -> None:
        self._step_start = self._clock()
        self._spans: list[Span] = []
        self._tokens: defaultdict[str, int] = defaultdict(int)


def _union_seconds(spans: list[Span]) -> float:
    covered, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        covered += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return covered
