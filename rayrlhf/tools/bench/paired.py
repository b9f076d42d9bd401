"""Paired speed comparisons on a noisy machine: interleaved runs, compared within rounds.

A machine's speed drifts by tens of percent over minutes, for all programs equally. So contenders run one after the other in
every round, speeds are compared within rounds, and the median over rounds is reported with a bootstrap interval (Efron 1979).
"""

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Literal, TypeVar, cast

import numpy as np

Contender = Callable[[], float]
"""Runs once and returns its speed."""

Precision = Literal["float32", "bfloat16"]
"""Compute precision; weights and optimizer states stay in float32."""

RESAMPLES = 2000
END_SECONDS = 15.0
"""Time for a contender to end on SIGTERM, before it is killed. A PPO run ends its step in 10."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Ratio:
    """Speed ratio: median over rounds with the 95 % interval of that median."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Speeds of contenders by round.

    Attributes:
        title: subject and conditions of the comparison.
        speeds: contender -> its speed in each round; the first is the baseline.
    """

    title: str
    unit: str
    speeds: Mapping[str, Sequence[float]]

    @property
    def baseline(self) -> str:
        """The contender that the others are compared with."""
        return next(iter(self.speeds))

    def median(self, name: str) -> float:
        """Median speed of a contender."""
        return float(np.median(self.speeds[name]))

    def ratio(self, name: str) -> Ratio:
        """Return a contender's speed ratio to the baseline, paired by round."""
        return paired_ratio(self.speeds[name], self.speeds[self.baseline])

    def numbers(self) -> dict[str, Any]:
        """Return title, unit, speeds, medians and ratios as plain values."""
        others = [name for name in self.speeds if name != self.baseline]
        return {
            "title": self.title,
            "unit": self.unit,
            "speeds": {name: list(speeds) for name, speeds in self.speeds.items()},
            "medians": {name: self.median(name) for name in self.speeds},
            "ratios": {name: list(astuple(self.ratio(name))) for name in others},
        }

    def as_markdown(self) -> str:
        """Return a Markdown table of medians and ratios."""
        times = "times as fast" if self.unit.endswith("/s") else "times as many"
        lines = [f"**{self.title}**", "", f"| | median {self.unit} | {times} (95 %) |", "|---|---|---|"]
        for name in self.speeds:
            ratio = self.ratio(name)
            times = "1" if name == self.baseline else f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
            lines.append(f"| {name} | {self.median(name):,.0f} | {times} |")
        return "\n".join(lines)


def compare(
    title: str,
    unit: str,
    contenders: Mapping[str, Contender],
    rounds: int,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Run the contenders alternately, in reverse order every other round.

    Args:
        unit: of a speed, for example `tokens/s`.
        contenders: name -> function that runs once; the first is the baseline.
    """
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        order = list(contenders)[:: 1 if number % 2 == 0 else -1]
        for name in order:
            speed = contenders[name]()
            speeds[name].append(speed)
            progress(f"{title}: round {number + 1} of {rounds}: {name} {speed:,.0f} {unit}")
    return Comparison(title, unit, speeds)


def in_new_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Run a contender in a new process, without threads, caches or groups of earlier ones.

    Its errors are raised here. The process ends with this call, also when a signal ends the call.

    Args:
        function: defined at the top level of a module, with a picklable result.
        arguments: picklable.

    Raises:
        RuntimeError: the process ended without a result.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_outcome, args=(sender, function, arguments))
    process.start()
    sender.close()  # the new process then holds the only one, so that its death ends `recv`
    try:
        try:
            result, error = receiver.recv()
        except EOFError:
            result, error = None, None
        process.join()
    except BaseException:
        process.terminate()
        process.join(END_SECONDS)
        process.kill()
        raise
    if error is not None:
        raise error
    if process.exitcode:
        raise RuntimeError(f"{function.__name__}: its process ended with {process.exitcode}")
    return cast("Result", result)


def _send_outcome(sender: Connection, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Send (result, None) or (None, error), the error with its traceback as a note."""
    outcome: tuple[Any, Exception | None]
    try:
        outcome = function(*arguments), None
    except Exception as error:  # noqa: BLE001 - raised in the parent
        error.add_note(traceback.format_exc())
        outcome = None, error
    sender.send(outcome)


def paired_ratio(speeds: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Return the median of speeds[i] / baseline[i] with its 95 % bootstrap interval."""
    ratios = np.asarray(speeds, dtype=np.float64) / np.asarray(baseline, dtype=np.float64)
    draws = np.random.default_rng(0).integers(0, len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))
