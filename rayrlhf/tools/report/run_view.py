"""Data of a run's report page, read from its folder, with notes on missing files."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from rayrlhf.errors import UserError
from rayrlhf.observe.host_facts import FILE_NAME as ENVIRONMENT
from rayrlhf.observe.journal import FILE_NAME as JOURNAL
from rayrlhf.observe.metrics import FILE_NAME as METRICS
from rayrlhf.observe.trace import FILE_NAME as TRACE
from rayrlhf.tools.report.metric_series import Series, series_by_name
from rayrlhf.tools.report.role_times import RoleSpan, role_spans
from rayrlhf.tools.report.run_files import MetricsTail, Row, read_lines, read_mapping, read_spans
from rayrlhf.tools.report.run_samples import SampledRollouts, read_rollouts, sample_rollouts
from rayrlhf.tools.report.run_state import RunState, is_locked, judge

MAX_ROLLOUTS = 600
MAX_ANSWERS = 2000
"""Maximum number of held-out answers that are compared."""


@dataclass(frozen=True, slots=True)
class RunView:
    """One run.

    Attributes:
        kind: "PPO", "SFT", "DPO", "reward model", "evaluation", "Pre-SFT" or "run".
        config_text: text of `config.yaml`; empty if missing.
        config: its content; empty if missing or invalid.
        environment: `environment.json`: machine and versions.
        result: `result.json` or `evaluation.json`; empty if missing.
        rows: lines of metrics, oldest first.
        series: metric -> its values.
        spans: work of the roles.
        rollouts: a subset of the training rollouts.
        before: responses to held-out prompts before training, with their step; may be empty.
        after: newest responses to the same prompts.
        recovery: events of `recovery.jsonl`.
        missing: notes on missing, damaged or omitted content.
    """

    folder: Path
    kind: str
    state: RunState
    config_text: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Row] = ()
    series: Mapping[str, Series] = field(default_factory=dict)
    spans: Sequence[RoleSpan] = ()
    rollouts: SampledRollouts = field(default_factory=SampledRollouts)
    before: Sequence[dict[str, Any]] = ()
    after: Sequence[dict[str, Any]] = ()
    recovery: Sequence[dict[str, Any]] = ()
    missing: Sequence[str] = ()

    @property
    def name(self) -> str:
        """The run's name, or that of its folder."""
        name = _section(self.config, "run").get("name")
        return name if isinstance(name, str) and name else self.folder.resolve().name

    def setting(self, section: str, key: str) -> Any:
        """Return a setting; None if the configuration does not have it."""
        return _section(self.config, section).get(key)


def read_run(folder: Path, *, max_rollouts: int = MAX_ROLLOUTS) -> RunView:
    """Read a run folder.

    Raises:
        UserError: no such folder, or no run in it; names runs in its subfolders.
    """
    check_run(folder)
    missing: list[str] = []
    tail = MetricsTail(folder)
    rows, _ = tail.read()
    config_text, config = read_mapping(folder / "config.yaml")
    _, result = read_mapping(folder / "result.json")
    result = result or read_mapping(folder / "evaluation.json")[1]
    kind = kind_of(config)
    spans, broken_spans = read_spans(folder)
    rollouts = sample_rollouts(folder / ("answers" if kind == "evaluation" else "samples"), max_rollouts)
    before, after = _answers(folder)
    series = series_by_name(rows)
    missing += _metrics_notes(tail, rows, kind) + _config_notes(config_text, config)
    _, environment = read_mapping(folder / ENVIRONMENT)
    if not environment:
        missing.append(f"{ENVIRONMENT} is missing: machine and versions are unknown")
    if kind == "PPO" and not spans:
        missing.append(f"{TRACE} is missing or empty: no timeline")
    if broken_spans:
        missing.append(f"{TRACE}: {broken_spans} damaged {'line' if broken_spans == 1 else 'lines'} left out")
    if kind in ("PPO", "evaluation") and not rollouts.total:
        missing.append("no sampled responses: no table of rollouts")
    if rollouts.unreadable:
        missing.append(f"{rollouts.unreadable} files of samples cannot be read")
    return RunView(
        folder=folder,
        kind=kind,
        state=_state(folder, config, result, rows, series),
        config_text=config_text,
        config=config,
        environment=environment,
        result=result,
        rows=rows,
        series=series,
        spans=role_spans(spans),
        rollouts=rollouts,
        before=before,
        after=after,
        recovery=read_lines(folder / JOURNAL),
        missing=missing,
    )


def check_run(folder: Path) -> None:
    """Check that a folder holds a run.

    Raises:
        UserError: no run; names runs in its subfolders.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected the folder of a run")
    if (folder / "config.yaml").is_file() or (folder / METRICS).is_file():
        return
    found = sorted({path.parent for name in ("config.yaml", METRICS) for path in folder.glob(f"*/{name}")})
    below = f"; runs below it: {', '.join(str(path) for path in found)}" if found else ""
    raise UserError(f"{folder}: no run here, neither config.yaml nor {METRICS}{below}")


def folder_kind(folder: Path) -> str:
    """Return the kind of the run in a folder, see `kind_of`.

    Raises:
        UserError: no run.
    """
    check_run(folder)
    return kind_of(read_mapping(folder / "config.yaml")[1])


def kind_of(config: Mapping[str, Any]) -> str:
    """Return the kind of run of a configuration, by its characteristic sections."""
    for section, kind in (("algorithm", "PPO"), ("probe", "Pre-SFT"), ("export_anyway", "reward model"), ("workers", "SFT")):
        if section in config:
            return "DPO" if kind == "SFT" and "beta" in _section(config, "train") else kind
    return "evaluation" if "rollout" in config and "temperature" in config else "run"


def _state(
    folder: Path, config: Mapping[str, Any], result: Mapping[str, Any], rows: Sequence[Row], series: Mapping[str, Series]
) -> RunState:
    step = int(max((row["step"] for row in rows), default=0))
    steps = [_section(config, "run").get("steps"), _section(config, "train").get("steps"), result.get("steps")]
    total = next((count for count in steps if isinstance(count, int) and not isinstance(count, bool)), None)
    times = series.get("time/step")
    metrics = folder / METRICS
    quiet = time.time() - metrics.stat().st_mtime if rows and metrics.exists() else None
    return judge(
        step,
        total,
        exported=bool(result) or (folder / "export").is_dir(),
        locked=is_locked(folder / ".lock"),
        quiet_seconds=quiet,
        step_seconds=sum(times.values[-20:]) / len(times.values[-20:]) if times else None,
    )


def _metrics_notes(tail: MetricsTail, rows: Sequence[Row], kind: str) -> list[str]:
    notes = []
    if not rows and kind not in ("evaluation", "Pre-SFT"):
        notes.append(f"{METRICS} is missing or empty: no curves")
    if tail.damaged:
        notes.append(f"{METRICS}: {tail.damaged} damaged {'line' if tail.damaged == 1 else 'lines'} left out")
    if tail.torn:
        notes.append(f"{METRICS}: the last line is incomplete and left out")
    return notes


def _config_notes(text: str, config: Mapping[str, Any]) -> list[str]:
    if not text:
        return ["config.yaml is missing: the settings are unknown"]
    return [] if config else ["config.yaml is damaged: shown unchanged"]


def _answers(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the first and last responses to the same prompts, of evaluations or SFT samples."""
    for name in ("evaluation", "samples"):
        files = sorted((folder / name).glob("step-*.parquet"))
        if len(files) < 2:
            continue
        before, after = (read_rollouts(path, MAX_ANSWERS) for path in (files[0], files[-1]))
        prompts = {row.get("prompt_id") for row in before}
        if prompts and prompts == {row.get("prompt_id") for row in after}:
            return before, after
    return [], []


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def all_names(views: Sequence[RunView]) -> list[str]:
    """Return the distinct metric names of some runs in order of appearance."""
    return list(dict.fromkeys(chain.from_iterable(view.series for view in views)))
