"""Report page of a run folder, for every kind of run.

`rayrlhf report` writes it as a file and `rayrlhf watch --serve` keeps it current; both show the same blocks.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rayrlhf.observe.diagnostics import CHECKS, Finding, findings
from rayrlhf.observe.html.page import Block, DataTable, Heading, Paragraph, Tiles, render, write_page
from rayrlhf.observe.progress import duration
from rayrlhf.tools.report.difference_causes import flat
from rayrlhf.tools.report.first_difference import difference_section
from rayrlhf.tools.report.metric_series import Series
from rayrlhf.tools.report.run_answers import answers_section, rollouts_section, tokens_section
from rayrlhf.tools.report.run_blocks import Folded, Notice
from rayrlhf.tools.report.run_conversations import conversations_section
from rayrlhf.tools.report.run_curves import curve_sections, run_labels, with_derived
from rayrlhf.tools.report.run_timeline import timeline_section
from rayrlhf.tools.report.run_view import RunView, read_run

HEADLINES = (
    ("objective/scores", "score"),
    ("evaluation/score", "held-out score"),
    ("loss", "training loss"),
    ("evaluation/loss", "held-out loss"),
    ("evaluation/accuracy", "held-out accuracy"),
    ("objective/kl", "KL, nats per response"),
    ("policy/entropy_avg", "entropy, nats per token"),
    ("tokens/responses_len_mean", "response length"),
)
"""Metrics whose first and last values are at the top of the page."""


def write_run_report(folder: Path, *, compare: Path | None = None, output: Path | None = None) -> Path:
    """Write a run's page as a self-contained HTML file; returns its path.

    Args:
        folder: the run folder; only read, except for the default output.
        compare: another run folder, whose curves and settings are shown for comparison.
        output: the file; in the run folder when None: `report.html`, or `report-against-NAME.html` with `compare`.

    Raises:
        UserError: a folder holds no run, or the file cannot be written.
    """
    from rayrlhf.storage.atomic import writing

    view = read_run(folder)
    other = read_run(compare, max_rollouts=0) if compare is not None else None
    path = output or folder / ("report.html" if compare is None else f"report-against-{compare.resolve().name}.html")
    with writing(path):
        write_page(path, *page_of(view, other))
    return path


def live_page(folder: Path, *, max_rollouts: int) -> str:
    """Return a run's page for the live server.

    Raises:
        UserError: the folder holds no run.
    """
    return render(*page_of(read_run(folder, max_rollouts=max_rollouts)), live=True)


def page_of(view: RunView, other: RunView | None = None) -> tuple[str, str, list[Block]]:
    """Return title, subtitle and blocks of a run's page."""
    blocks: list[Block] = [state_notice(view)]
    if view.missing:
        blocks.append(Notice("info", "Parts of this run cannot be shown", view.missing))
    blocks.append(Tiles(_figures(view)))
    blocks += findings_section(view)
    if other is not None:
        blocks += difference_section(view, other)
    blocks += _comparison(view, other)
    blocks += curve_sections(view, other)
    blocks += timeline_section(view)
    blocks += answers_section(view)
    blocks += conversations_section(view.rollouts.rows)
    blocks += tokens_section(view.rollouts.rows)
    blocks += rollouts_section(view)
    blocks += recovery_section(view)
    blocks += what_ran(view)
    against = f", against {other.name}" if other is not None else ""
    return f"{view.kind}: {view.name}", f"{_subject(view)}{against}", blocks


def state_notice(view: RunView) -> Notice:
    """Return the state of a run as a notice."""
    kinds = {"finished": "good", "running": "info", "stopped": "warning", "empty": "warning"}
    words = view.state.words()
    return Notice(kinds[view.state.state], words[0].upper() + words[1:])  # type: ignore[arg-type]


def _subject(view: RunView) -> str:
    model, train = view.setting("model", "path"), view.setting("data", "train") or view.setting("data", "path")
    data = train.get("path") if isinstance(train, dict) else train
    return ", ".join(str(part) for part in (model, data) if part) or str(view.folder)


def _figures(view: RunView) -> list[tuple[str, str]]:
    figures = []
    for metric, label in HEADLINES:
        series = view.series.get(metric)
        if series and len(series.values) > 1:
            figures.append((label, f"{_short(series.values[0])} → {_short(series.last)}"))
        elif series:
            figures.append((label, _short(series.last)))
    derived = with_derived(view)
    for metric, label in (("derived/seconds_per_response", "seconds per response"), ("memory/peak_gib", "GiB at the peak")):
        if metric in derived:
            figures.append((label, _short(derived[metric].last)))
    times = view.series.get("time/step")
    if times:
        figures.append(("total step time", duration(sum(times.values))))
    score = view.result.get("score")
    if isinstance(score, dict) and all(isinstance(score.get(key), int | float) for key in ("mean", "low", "high")):
        figures.append(("mean score, 95 % interval", f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"))
    return figures


def _comparison(view: RunView, other: RunView | None) -> Iterator[Block]:
    if other is None:
        return
    yield Heading("Comparison with the other run")
    this_label, other_label = run_labels([view, other])
    yield Paragraph(f"{other_label} is drawn dashed ({other.state.words()}).")
    rows = [
        row
        for metric, label in HEADLINES
        if metric in view.series and metric in other.series
        for row in _side_by_side(label, view.series[metric], other.series[metric])
    ]
    if rows:
        yield DataTable(["value", "step", this_label, other_label, "difference"], rows)
    one, two = flat(view.config), flat(other.config)
    keys = [key for key in dict.fromkeys([*one, *two]) if one.get(key) != two.get(key)]
    changed = [(key, one.get(key), two.get(key)) for key in keys]
    if changed:
        yield DataTable(["setting that differs", this_label, other_label], changed)


def _side_by_side(label: str, one: Series, two: Series) -> Iterator[tuple[str, str, float, float, float | None]]:
    """Yield a metric's values at the newest common step.

    The last values follow if they are of another step.
    """
    here, there = (dict(zip(series.steps, series.values, strict=True)) for series in (one, two))
    common = max(here.keys() & there.keys(), default=None)
    if common is not None:
        yield label, f"{common:g}", here[common], there[common], here[common] - there[common]
    steps = (one.steps[-1], two.steps[-1])
    if steps != (common, common):
        yield f"{label}, last", f"{steps[0]:g} and {steps[1]:g}", one.last, two.last, None


def recovery_section(view: RunView) -> Iterator[Block]:
    """Yield the newest events of the run's journal."""
    if not view.recovery:
        return
    yield Heading("Losses and recoveries")
    rows = [tuple(_plain(event.get(key)) for key in ("event", "actor", "seconds", "reason")) for event in view.recovery[-500:]]
    yield DataTable(["event", "process", "seconds", "reason"], rows)


def what_ran(view: RunView) -> Iterator[Block]:
    """Yield the run's environment and configuration."""
    if not view.config_text and not view.environment:
        return
    yield Heading("Configuration and environment")
    facts = [(key, _plain(value)) for key, value in flat(view.environment).items()]
    if facts:
        yield DataTable(["environment", "value"], facts)
    if view.config_text:
        yield Folded("config.yaml", view.config_text)


def _plain(value: object) -> str | int | float | None:
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


ALARM_PREFIX = "alarm/"


def findings_section(view: RunView) -> Iterator[Block]:
    """Yield findings with evidence and remedy, alarms first, or a notice that there are none."""
    if view.kind != "PPO" or not view.rows:
        return
    found = findings(view.rows)
    yield Heading("Findings")
    for finding in found:
        yield notice(finding)
    if not found:
        yield Notice("good", f"None of the {len(CHECKS)} checks has a finding at the newest step")
    earlier = earlier_alarms(view, found)
    if earlier:
        yield Paragraph("Recorded during the run, and resolved at its newest step:")
        yield DataTable(["finding", "steps", "first step", "last step"], earlier)


def notice(finding: Finding) -> Notice:
    """Return a finding as a notice with name, evidence and remedy."""
    title = f"{finding.name.replace('_', ' ').capitalize()}, since step {finding.since_step:,}"
    return Notice(
        "bad" if finding.severity == "alarm" else "warning",
        title,
        [f"{finding.evidence[:1].upper()}{finding.evidence[1:]}.", finding.remedy],
    )


def earlier_alarms(view: RunView, found: Sequence[Finding]) -> list[tuple[str, int, int, int]]:
    """Return (finding, number of steps, first, last) of recorded findings that are resolved."""
    present = {finding.name for finding in found}
    earlier = []
    for name, series in sorted(view.series.items()):
        label = name.removeprefix(ALARM_PREFIX)
        steps = [int(step) for step, value in zip(series.steps, series.values, strict=True) if value]
        if name.startswith(ALARM_PREFIX) and label not in present and steps:
            earlier.append((label.replace("_", " "), len(steps), steps[0], steps[-1]))
    return earlier
