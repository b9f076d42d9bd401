"""Chains of stages, run in order and each in a run folder of its own.

A finished stage leaves `RUN/STAGE.done.json` with its resolved configuration and headline. On a rerun a stage with the same
configuration is skipped, and an unfinished one resumes by its own rules. A finished stage with a changed configuration is
rejected, because later stages were made from the old one.
"""

import difflib
import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rayrlhf.actors.connection import connected
from rayrlhf.config.loading.load import dump_config, load_config, load_tree, stored_differences
from rayrlhf.config.pipelines import ChainConfig, StageSection
from rayrlhf.config.section import Section
from rayrlhf.errors import UserError
from rayrlhf.pipelines.chain.stages import STAGES
from rayrlhf.storage.atomic import write_atomically, writing
from rayrlhf.storage.notes import read_note, reading


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage with its resolved configuration."""

    section: StageSection
    config: Section
    folder: Path

    @property
    def done(self) -> Path:
        """File that marks a finished stage."""
        return self.folder.with_name(f"{self.folder.name}.done.json")

    @property
    def spent(self) -> Path:
        """File with the seconds of a stage's unfinished runs."""
        return self.folder.with_name(f"{self.folder.name}.spent.json")


@dataclass(frozen=True, slots=True)
class StageReport:
    """Result of a stage.

    Attributes:
        headline: its result in one line.
        seconds: wall time of the run that finished it, and of those that an error or signal ended before.
        skipped: True where an earlier run of the chain finished it.
    """

    name: str
    kind: str
    headline: str
    seconds: float
    skipped: bool


def plan_chain(config: ChainConfig, base: Path) -> list[PlannedStage]:
    """Resolve every stage's configuration before the first one runs.

    Args:
        base: folder of relative configuration files, which is the chain file's.

    Raises:
        UserError: a stage's file, key, value or reference is wrong, or it was finished with another configuration.
    """
    outputs: dict[str, Mapping[str, str]] = {}
    planned = []
    for section in config.stages:
        stage = STAGES[section.kind]
        folder = config.run.folder / section.name
        settings = fill_in(section.settings, outputs, f"stage {section.name}")
        settings.setdefault("run", {})
        settings["run"] = dict(settings["run"]) | {"name": section.name, "root": str(config.run.folder)}
        file = base / section.config if section.config is not None else None
        resolved = load_tree(stage.config, settings, file, f"stage {section.name}")
        planned.append(PlannedStage(section, resolved, folder))
        outputs[section.name] = stage.outputs(folder, resolved)
        _check_done(planned[-1])
    return planned


def run_chain(config: ChainConfig, base: Path, console: Console | None = None) -> list[StageReport]:
    """Run the unfinished stages, and return a report for each stage.

    Raises:
        UserError: as `plan_chain`, and as the stages.
    """
    planned = plan_chain(config, base)
    console = console or Console()
    with writing(config.run.folder):
        config.run.folder.mkdir(parents=True, exist_ok=True)
    reports = []
    # One local Ray for all stages, because its start takes longer than a small stage.
    needs_ray = any(stage.section.kind != "evaluate" and not stage.done.is_file() for stage in planned)
    with connected(config.address) if needs_ray else nullcontext():
        for number, stage in enumerate(planned, start=1):
            console.print(f"stage {number} of {len(planned)}: {stage.section.name} ({stage.section.kind})", highlight=False)
            report = _run_stage(stage)
            reports.append(report)
            console.print(_line(report), markup=False, highlight=False, soft_wrap=True)
    return reports


def summary(reports: Sequence[StageReport]) -> list[str]:
    """Return one line per stage, and the total time."""
    total = sum(report.seconds for report in reports)
    return [*map(_line, reports), f"{total / 60:.1f} minutes in all stages"]


def load_chain(path: Path, overrides: Sequence[str] = ()) -> ChainConfig:
    """Read a chain's configuration; `stages.0.settings.train.steps=10` overrides a stage's setting."""
    return load_config(ChainConfig, path, overrides)


_AGAIN = "remove it, and the stage runs again"


def _run_stage(stage: PlannedStage) -> StageReport:
    section = stage.section
    if stage.done.is_file():
        with reading(stage.done, _AGAIN):
            stored = read_note(stage.done, _AGAIN)
            return StageReport(section.name, section.kind, stored["headline"], stored["seconds"], True)
    started = time.monotonic()
    if stage.spent.is_file():
        with reading(stage.spent, _AGAIN):
            started -= read_note(stage.spent, _AGAIN)["seconds"]
    try:
        headline = STAGES[section.kind].run(stage.config)
    except BaseException:
        write_atomically(stage.spent, json.dumps({"seconds": time.monotonic() - started}) + "\n")
        raise
    seconds = time.monotonic() - started
    done = {"config": dump_config(stage.config), "headline": headline, "seconds": seconds}
    write_atomically(stage.done, json.dumps(done, indent=2) + "\n")
    stage.spent.unlink(missing_ok=True)
    return StageReport(section.name, section.kind, headline, seconds, False)


def _check_done(stage: PlannedStage) -> None:
    """Reject a stage that was finished with another configuration."""
    if not stage.done.is_file():
        return
    with reading(stage.done, _AGAIN):
        stored = read_note(stage.done, _AGAIN)
        changed = stored_differences(type(stage.config), stored["config"], dump_config(stage.config))
    if changed:
        raise UserError(
            f"stage {stage.section.name} was finished with another configuration ({'; '.join(changed[:3])}): choose another "
            f"run.name, or remove {stage.done} and {stage.folder}, and the results of later stages"
        )


def _line(report: StageReport) -> str:
    state = "done before" if report.skipped else f"{report.seconds:.0f} s"
    return f"{report.name}: {report.headline} ({state})"


_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
Outputs = Mapping[str, Mapping[str, str]]
"""Stage name -> output name -> value, of the stages before the current one."""


def fill_in(settings: object, outputs: Outputs, place: str) -> Any:
    """Return settings with every reference replaced.

    Args:
        outputs: of the stages before this one.

    Raises:
        UserError: a reference to an unknown or later stage, or to an unknown output.
    """
    if isinstance(settings, Mapping):
        return {key: fill_in(value, outputs, f"{place}.{key}") for key, value in settings.items()}
    if isinstance(settings, list):
        return [fill_in(value, outputs, f"{place}.{index}") for index, value in enumerate(settings)]
    if isinstance(settings, str):
        return _REFERENCE.sub(lambda match: _value(match[1], outputs, place), settings)
    return settings


def _value(reference: str, outputs: Outputs, place: str) -> str:
    stage, _, output = reference.partition(".")
    if stage not in outputs:
        raise UserError(f"{place}: ${{{reference}}}: no stage {stage!r} before this one{_hint(stage, outputs)}")
    if output not in outputs[stage]:
        raise UserError(f"{place}: ${{{reference}}}: stage {stage!r} has no output {output!r}{_hint(output, outputs[stage])}")
    return outputs[stage][output]


def _hint(wrong: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(known) or 'none'}"
