"""Figures with their bars, and results of steps."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Status = Literal["passed", "failed", "skipped"]


class StepSkippedError(Exception):
    """A step cannot run here; holds the reason."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value.

    Attributes:
        at_most: bar; NaN never meets it.
        at_least: bar; NaN never meets it.
        among: allowed texts; empty allows all.
        headline: part of the table at the end.
        published: figure of another trainer to read it next to.
    """

    name: str
    value: float | str
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None
    among: tuple[str, ...] = ()
    headline: bool = False
    published: str = ""

    @property
    def meets_bar(self) -> bool:
        """True if the value meets its bar, or has none."""
        if isinstance(self.value, str):
            return not self.among or self.value in self.among
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)

    @property
    def bar(self) -> str:
        """The bar in words; empty without one."""
        if self.among:
            return " or ".join(self.among)
        bounds = (("at most", self.at_most), ("at least", self.at_least))
        return ", ".join(f"{words} {_number(bound)}" for words, bound in bounds if bound is not None)

    @property
    def measured(self) -> str:
        """The value with its unit."""
        text = self.value if isinstance(self.value, str) else _number(self.value)
        return f"{text} {self.unit}".rstrip()

    def line(self) -> str:
        """Return name, value and bar in one line."""
        return f"{self.name}: {self.measured}" + (f" ({self.bar})" if self.bar else "")


def _number(value: float) -> str:
    if abs(value) < 1e15 and value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@dataclass(frozen=True, slots=True)
class StepResult:
    """Outcome of one step; `reason` says why it failed or was skipped."""

    name: str
    status: Status
    figures: tuple[Figure, ...] = ()
    reason: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, which has no NaN and infinity: they are text."""
        values = asdict(self)
        for figure in values["figures"]:
            if isinstance(figure["value"], float) and not math.isfinite(figure["value"]):
                figure["value"] = str(figure["value"])
        return values


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the check.

    Attributes:
        function: `module:function`; yields the figures on a device.
        seconds: limit, without imports of torch and transformers.
        needs: modules that must be installed.
        gpus: devices that it needs.
    """

    name: str
    function: str
    seconds: float
    needs: tuple[str, ...] = ()
    gpus: int = 1

    def obstacle(self, gpus: int) -> str:
        """Return why it cannot run with so many GPUs, or an empty text."""
        missing = [name for name in self.needs if find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        return f"needs {self.gpus} GPUs, found {gpus}" if gpus < self.gpus else ""


@dataclass(slots=True)
class Notes:
    """Lines of a step's process: figures, and how it ended."""

    figures: list[Figure] = field(default_factory=list)
    status: Status | None = None
    reason: str = ""

    def add(self, line: dict[str, Any]) -> None:
        """Read one line."""
        if "figure" in line:
            values = line["figure"]
            self.figures.append(Figure(**values | {"among": tuple(values["among"])}))
        else:
            self.status, self.reason = line["status"], line["reason"]

    def result(self, name: str, seconds: float) -> StepResult:
        """Return the step's result: figures below their bar fail a step that ended well."""
        status, reason = self.status or "failed", self.reason
        missed = [figure.line() for figure in self.figures if not figure.meets_bar]
        if status == "passed" and (missed or not self.figures):
            status, reason = "failed", "; ".join(missed) or "no figure was measured"
        return StepResult(name, status, tuple(self.figures), reason, seconds)


def measure(function: str, device: "torch.device", note: Callable[[dict[str, Any]], None]) -> None:
    """Run a step's function in this process, and note each figure and the end.

    Args:
        function: `module:function`.
        device: to compute on; on a CPU sizes are tiny.
        note: receives lines as `Notes.add` reads them.
    """
    import traceback

    try:
        for figure in resolve(function)(device):
            note({"figure": asdict(figure)})
        note({"status": "passed", "reason": ""})
    except StepSkippedError as error:
        note({"status": "skipped", "reason": str(error)})
    except Exception as error:  # noqa: BLE001 - the other steps run
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        note({"status": "failed", "reason": f"{type(error).__name__}: {first}"})


def resolve(function: str) -> Callable[["torch.device"], Iterator[Figure]]:
    """Import a step's function."""
    module, _, name = function.partition(":")
    found: Callable[[torch.device], Iterator[Figure]] = getattr(import_module(module), name)
    return found
