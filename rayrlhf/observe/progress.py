"""Progress of a run: last metrics, score history, estimated time left; no terminal output."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rayrlhf.observe.metric_names import SCORE_ERROR
from rayrlhf.observe.phases import SHARE_PREFIX, TOKENS_PER_SECOND

SHOWN = (
    ("score", "objective/scores", "{:.3f}"),
    ("loss", "loss", "{:.3f}"),
    ("accuracy", "accuracy", "{:.2f}"),
    ("margin", "margin", "{:.2f}"),
    ("KL", "objective/kl", "{:.3f}"),
    ("entropy", "policy/entropy_avg", "{:.3f}"),
    ("length", "tokens/responses_len_mean", "{:.0f}"),
    ("tok/s", TOKENS_PER_SECOND, "{:.0f}"),
)
"""(label, metric, format) of the numbers shown for each step; missing ones are left out."""

SCORE = SHOWN[0][1]
STEPS_FOR_ETA = 20
NORMAL_95 = 1.96
"""Standard errors in half of a 95 % interval."""
_BARS = "▁▂▃▄▅▆▇█"


@dataclass
class Progress:
    """State of the live view and the plain lines.

    Attributes:
        total: steps of the run.
        scores: mean score of each recorded step, oldest first.
    """

    total: int
    step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    scores: list[float] = field(default_factory=list)
    _finished_at: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=STEPS_FOR_ETA + 1))

    def start(self, now: float) -> None:
        """Record the start of the next step; `now` is in seconds of a monotonic clock."""
        self._finished_at.append((self.step, now))

    def finish_step(self, step: int, metrics: Mapping[str, float], now: float) -> None:
        """Record a completed step."""
        self.step, self.metrics = step, metrics
        if SCORE in metrics:
            self.scores.append(float(metrics[SCORE]))
        self._finished_at.append((step, now))

    def seconds_left(self, now: float) -> float | None:
        """Estimate the time left from the mean of the last steps; None before the first."""
        if len(self._finished_at) < 2:
            return None
        (first, start), (last, end) = self._finished_at[0], self._finished_at[-1]
        if last <= first:
            return None
        seconds_per_step = (end - start) / (last - first)
        return max(0.0, (self.total - self.step) * seconds_per_step - (now - end))

    def numbers(self) -> list[tuple[str, str]]:
        """Return (label, value) of the last step's numbers.

        The score has its 95 % interval over prompts.
        """
        numbers = {label: form.format(self.metrics[name]) for label, name, form in SHOWN if name in self.metrics}
        if "score" in numbers and SCORE_ERROR in self.metrics:
            numbers["score"] += f" ± {NORMAL_95 * self.metrics[SCORE_ERROR]:.3f}"
        return list(numbers.items())

    def shares(self) -> list[tuple[str, float]]:
        """Return (phase, share of the last step), largest first."""
        shares = [(k.removeprefix(SHARE_PREFIX), v) for k, v in self.metrics.items() if k.startswith(SHARE_PREFIX)]
        return sorted(shares, key=lambda share: -share[1])

    def line(self, now: float) -> str:
        """Return the step as one plain line."""
        left = self.seconds_left(now)
        seconds = self.metrics.get("time/step")
        parts = [f"step {self.step}/{self.total}", *(f"{label} {value}" for label, value in self.numbers())]
        parts += [f"{seconds:.1f} s/step"] if seconds is not None else []
        parts += [f"{name} {share:.0%}" for name, share in self.shares()[:3]]
        return "  ".join(parts + ([f"{duration(left)} left"] if left is not None else []))


def sparkline(values: Sequence[float], width: int) -> str:
    """Return at most `width` bars, each the mean of a segment; NaN is a gap."""
    count = min(width, len(values))
    if count <= 0:
        return ""
    segments = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    means = [sum(segment) / len(segment) for segment in segments]
    finite = [mean for mean in means if abs(mean) < float("inf")]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    span = high / 2 - low / 2  # halves, because the difference of large numbers overflows
    heights = [(mean / 2 - low / 2) / span if span > 0 else mean * 0 for mean in means]
    return "".join(_BARS[round(height * (len(_BARS) - 1))] if abs(height) < float("inf") else " " for height in heights)


def duration(seconds: float) -> str:
    """Return seconds as `42s`, `3m07s` or `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
