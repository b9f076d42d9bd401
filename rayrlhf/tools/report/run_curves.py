"""Report sections of curves, alone or compared with another run, and derived metrics."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from rayrlhf.observe.html.charts import Figure, axes, constant_range
from rayrlhf.observe.html.page import Block, Chart, DataTable, Heading
from rayrlhf.tools.report.curve_catalog import (
    EPISODES,
    GROUPS,
    SECONDS_PER_RESPONSE,
    STALENESS,
    STEP_TIME,
    SYNC_VERSION,
    Curve,
    curves_of,
)
from rayrlhf.tools.report.metric_series import Series, per_step, quotient, thinned
from rayrlhf.tools.report.run_blocks import ChartGrid, CurveControls, Folded
from rayrlhf.tools.report.run_view import RunView, all_names


def curve_sections(view: RunView, other: RunView | None) -> Iterator[Block]:
    """Yield the run's curves by group, with those of the other run, and all metrics."""
    views = [view] if other is None else [view, other]
    every = [with_derived(each) for each in views]
    names = list(dict.fromkeys(name for series in every for name in series))
    labels = run_labels(views)
    first = True
    for group in GROUPS:
        curves = curves_of(group, names)
        if not curves:
            continue
        yield Heading(group.heading)
        if first:
            yield CurveControls(labels[1] if other is not None else None)
            first = False
        yield ChartGrid([Chart(curve_figure(curve, every, labels), curve.words or curve.metric) for curve in curves])
    if all_names(views):
        yield Heading("All metrics")
        yield Folded(f"{len(all_names(views))} metrics: first, last, lowest and highest value", blocks=[_table(view)])


def with_derived(view: RunView) -> dict[str, Series]:
    """Return the run's series and derived ones."""
    series = dict(view.series)
    if STEP_TIME in series and EPISODES in series:
        responses = per_step(_from_start(series[EPISODES]))
        cost = quotient(series[STEP_TIME], responses)
        if cost.steps:
            series[SECONDS_PER_RESPONSE] = cost
    stale = staleness(view.rollouts.rows, series.get(SYNC_VERSION))
    if stale.steps:
        series[STALENESS] = stale
    return series


def staleness(rollouts: Sequence[Mapping[str, Any]], versions: Series | None) -> Series:
    """Return the mean staleness of the sampled rollouts of each step.

    Args:
        rollouts: rows with `step` and `version`, the newest weight version of the response.
        versions: the version produced by each step, which the next step trains.
    """
    trained = dict(zip(versions.steps[1:], versions.values, strict=False)) if versions else {}
    lags: dict[int, list[float]] = {}
    for row in rollouts:
        step, version = row.get("step"), row.get("version")
        if isinstance(step, int) and isinstance(version, int) and step in trained:
            lags.setdefault(step, []).append(max(0.0, trained[step] - version))
    steps = sorted(lags)
    return Series(steps, [sum(lags[step]) / len(lags[step]) for step in steps])


def curve_figure(curve: Curve, every: Sequence[Mapping[str, Series]], labels: Sequence[str]) -> Figure:
    """Return one metric's figure: a trace per run, with points and means for smoothing."""
    data = []
    for place, (series, label) in enumerate(zip(every, labels, strict=True)):
        if curve.metric not in series:
            continue
        drawn = thinned(series[curve.metric])
        trace = {"type": "scatter", "name": escape(label), "x": drawn.points[0], "y": drawn.points[1]}
        data.append(trace | {"means": {"x": drawn.means[0], "y": drawn.means[1]}, "compare": place > 0})
    layout = axes(curve.title, "step", curve.unit) | {"showlegend": len(data) > 1}
    span = constant_range(value for series in every if curve.metric in series for value in series[curve.metric].values)
    if span is not None:
        layout["yaxis"]["range"] = span
    return {"data": data, "layout": layout}


def run_labels(views: Sequence[RunView]) -> list[str]:
    """Return distinct run names, with a differing parent folder if the names are equal."""
    names = [view.name for view in views]
    if len(set(names)) == len(names):
        return names
    above = zip(*(reversed(view.folder.resolve().parts) for view in views), strict=False)
    different = next((parts for parts in above if len(set(parts)) == len(parts)), names)
    return [f"{name} ({part})" for name, part in zip(names, different, strict=True)]


def _from_start(total: Series) -> Series:
    """Prepend the initial 0 of a running total, one step before its first value."""
    return Series([total.steps[0] - 1, *total.steps], [0.0, *total.values])


def _table(view: RunView) -> DataTable:
    rows = [
        (name, len(series.values), series.values[0], series.last, min(series.values), max(series.values))
        for name, series in sorted(view.series.items())
    ]
    return DataTable(["metric", "values", "first", "last", "lowest", "highest"], rows, filterable=True)
