"""Running a chain: stages in order, each in a run folder of its own, finished ones skipped.

A finished stage leaves `RUN/STAGE.done.json` with its resolved configuration and its headline. On a rerun a stage with the same
configuration is skipped, an unfinished one resumes by its own rules, and one whose configuration changed is refused, because
what came after it was made from the old one.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rayrlhf.actors.connection import connected
from rayrlhf.config.chain import ChainConfig, StageSection
from rayrlhf.config.loading.load import differences, dump_config, load_config, load_tree, stored_config
from rayrlhf.config.section import Section
from rayrlhf.errors import UserError
from rayrlhf.pipelines.chain.references import fill_in
from rayrlhf.pipelines.chain.stages import STAGES
from rayrlhf.storage.atomic import write_atomically, writing


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage whose configuration is settled."""

    section: StageSection
    config: Section
    folder: Path

    @property
    def done(self) -> Path:
        """The mark of a finished stage."""
        return self.folder.with_name(f"{self.folder.name}.done.json")


@dataclass(frozen=True, slots=True)
class StageReport:
    """What a stage came to.

    Attributes:
        name: the stage.
        kind: what it did.
        headline: its result in one line.
        seconds: wall time of the run that finished it.
        skipped: whether an earlier run of the chain had finished it.
    """

    name: str
    kind: str
    headline: str
    seconds: float
    skipped: bool


def plan_chain(config: ChainConfig, base: Path) -> list[PlannedStage]:
    """Settle every stage's configuration before the first one runs.

    Args:
        config: the chain.
        base: folder that relative configuration files are in: the chain file's own.

    Raises:
        UserError: a stage's file, key, value or reference is wrong; or it was finished with another configuration.
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
    """Run what is not done yet; returns a report for each stage.

    Raises:
        UserError: see `plan_chain`; and what the stages raise.
    """
    planned = plan_chain(config, base)
    console = console or Console()
    with writing(config.run.folder):
        config.run.folder.mkdir(parents=True, exist_ok=True)
    reports = []
    # One local Ray for all stages: starting it takes longer than a small stage.
    needs_ray = any(stage.section.kind != "evaluate" and not stage.done.is_file() for stage in planned)
    with connected(config.address) if needs_ray else nullcontext():
        for number, stage in enumerate(planned, start=1):
            console.print(f"stage {number} of {len(planned)}: {stage.section.name} ({stage.section.kind})", highlight=False)
            report = _run_stage(stage)
            reports.append(report)
            console.print(_line(report), markup=False, highlight=False, soft_wrap=True)
    return reports


def summary(reports: Sequence[StageReport]) -> list[str]:
    """One line a stage, and the time of all."""
    total = sum(report.seconds for report in reports)
    return [*map(_line, reports), f"{total / 60:.1f} minutes in all stages"]


def load_chain(path: Path, overrides: Sequence[str] = ()) -> ChainConfig:
    """Read a chain's configuration file; overrides reach into stages by number (`stages.0.settings.train.steps=10`)."""
    return load_config(ChainConfig, path, overrides)


def _run_stage(stage: PlannedStage) -> StageReport:
    section = stage.section
    if stage.done.is_file():
        stored = json.loads(stage.done.read_text(encoding="utf-8"))
        return StageReport(section.name, section.kind, stored["headline"], stored["seconds"], True)
    started = time.monotonic()
    headline = STAGES[section.kind].run(stage.config)
    seconds = time.monotonic() - started
    done = {"config": dump_config(stage.config), "headline": headline, "seconds": seconds}
    write_atomically(stage.done, json.dumps(done, indent=2) + "\n")
    return StageReport(section.name, section.kind, headline, seconds, False)


def _check_done(stage: PlannedStage) -> None:
    """Refuse to skip a stage that was finished with another configuration."""
    if not stage.done.is_file():
        return
    stored: dict[str, Any] = json.loads(stage.done.read_text(encoding="utf-8"))
    before = stored_config(type(stage.config), stored["config"])
    changed = differences(before, stage.config)
    if changed:
        raise UserError(
            f"stage {stage.section.name} was finished with another configuration ({'; '.join(changed[:3])}): choose another "
            f"run.name, or remove {stage.done} and {stage.folder}, and what later stages made of it"
        )


def _line(report: StageReport) -> str:
    state = "done before" if report.skipped else f"{report.seconds:.0f} s"
    return f"{report.name}: {report.headline} ({state})"
