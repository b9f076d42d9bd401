"""Phase timing of a step: seconds, share of the step, and tokens per second.

Phases may overlap (scoring during generation), so shares can add up to more than 1. The share outside all phases, `other`, is
computed from the union of all spans and is the driver's own cost.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SHARE_PREFIX = "time_share/"
TOKENS_PER_SECOND = "speed/tokens_per_second"
"""Generated tokens of a step per second of the whole step: the throughput of a run."""


@dataclass(frozen=True, slots=True)
class Span:
    """One interval of a phase, in seconds since the epoch on a monotonic clock."""

    name: str
    start: float
    end: float


class PhaseTimer:
    """Times the phases of each step; phases outside a step are not counted.

    Args:
        clock: returns seconds.
        listener: called with the name of an outermost phase of a step when it begins, and with "" when it ends.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, listener: Callable[[str], None] = lambda phase: None
    ) -> None:
        self._clock = clock
        self._listener = listener
        self._in_step = False
        self._open = 0
        self._epoch = time.time() - clock()
        self._end: float | None = None
        self._begin()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one step and discard the previous one."""
        self._begin()
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
            self._end = self._clock()

    @contextmanager
    def phase(self, name: str, tokens: int = 0) -> Iterator[None]:
        """Time a block, also if it raises; durations of one name add up."""
        start = self._clock()
        self._open += 1
        self._tell(name)
        try:
            yield
        finally:
            self._tell("")
            self._open -= 1
            self._spans.append(Span(name, start + self._epoch, self._clock() + self._epoch))
            self._tokens[name] += tokens

    def add_tokens(self, name: str, tokens: int) -> None:
        """Add tokens to a phase after it has ended."""
        self._tokens[name] += tokens

    @property
    def spans(self) -> tuple[Span, ...]:
        """The finished spans since the step began, for the trace."""
        return tuple(self._spans)

    def metrics(self, *, generated_tokens: int = 0) -> dict[str, float]:
        """Sum up the last step.

        Args:
            generated_tokens: response tokens sampled in the step; also the tokens of the phase `generate`.

        Returns:
            `time/step` and `time/PHASE` in seconds, `time_share/PHASE` and `time_share/other` of the step in [0, 1],
            `speed/PHASE_tokens_per_second` for phases with tokens, and `speed/tokens_per_second`.
        """
        end = self._clock() if self._end is None else self._end
        step_seconds = max(end - self._start, 1e-9)
        seconds: defaultdict[str, float] = defaultdict(float)
        for span in self._spans:
            seconds[span.name] += span.end - span.start
        metrics = {"time/step": step_seconds}
        metrics |= {f"time/{name}": total for name, total in seconds.items()}
        metrics |= {SHARE_PREFIX + name: total / step_seconds for name, total in seconds.items()}
        metrics[f"{SHARE_PREFIX}other"] = max(0.0, 1.0 - _union_seconds(self._spans) / step_seconds)
        tokens = self._tokens | ({"generate": generated_tokens} if generated_tokens else {})
        metrics |= {f"speed/{name}_tokens_per_second": n / seconds[name] for name, n in tokens.items() if n and seconds[name]}
        if generated_tokens:
            metrics[TOKENS_PER_SECOND] = generated_tokens / step_seconds
        return metrics

    def _tell(self, phase: str) -> None:
        if self._in_step and self._open == 1:
            self._listener(phase)

    def _begin(self) -> None:
        self._start = self._clock()
        self._end = None
        self._spans: list[Span] = []
        self._tokens: defaultdict[str, int] = defaultdict(int)


def _union_seconds(spans: list[Span]) -> float:
    covered, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        covered += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return covered
