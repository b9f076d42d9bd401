"""Report section of times: last steps by role, waiting shares, seconds per phase."""

from collections.abc import Iterator, Mapping, Sequence

from rayrlhf.observe.html.charts import Figure, axes
from rayrlhf.observe.html.page import Block, Chart, DataTable, Heading, Paragraph
from rayrlhf.tools.report.metric_series import Series, thinned
from rayrlhf.tools.report.role_times import RoleSpan, RoleTime, last_steps, role_order, role_times
from rayrlhf.tools.report.run_view import RunView

STEPS_SHOWN = 3
PHASE_PREFIX = "time/"
NO_PHASES = {"time/step"}


def timeline_section(view: RunView) -> Iterator[Block]:
    """Yield the recorded times of the run."""
    phases = {
        name.removeprefix(PHASE_PREFIX): series
        for name, series in view.series.items()
        if name.startswith(PHASE_PREFIX) and name.count("/") == 1 and name not in NO_PHASES
    }
    if not view.spans and not phases:
        return
    yield Heading("Time by role and phase")
    if view.spans:
        shown = last_steps(view.spans, STEPS_SHOWN)
        steps = sorted({span.step for span in shown if span.step is not None})
        what = f"steps {steps[0]:,} to {steps[-1]:,}" if steps else "the last spans"
        roles = role_order(shown)
        yield Chart(timeline(shown), f"Work of each role in {what}; gaps are waiting.", tall=90 + 34 * len(roles))
        times = role_times(view.spans)
        yield waits_table(times)
        yield Paragraph(
            "Percent of the time in which any role worked, over the whole trace, as measured by the driver. If several "
            "roles worked while one waited, the wait is divided among them.",
            note=True,
        )
        slowest = max(times, key=lambda time: time.busy, default=None)
        if slowest is not None:
            yield Paragraph(f"The busiest role is {slowest.role}, working {slowest.busy:.0%} of the time.")
    if phases:
        yield Chart(phase_seconds(phases), "Seconds of each phase, stacked; phases may overlap.")


def timeline(spans: Sequence[RoleSpan]) -> Figure:
    """Return bars over seconds, one row per role, one color per phase."""
    roles = role_order(spans)
    origin = min(span.start for span in spans)
    phases = list(dict.fromkeys(span.phase for span in spans))
    data = []
    for phase in phases:
        chosen = [span for span in spans if span.phase == phase]
        trace = {
            "type": "bar",
            "orientation": "h",
            "name": phase,
            "y": [span.role for span in chosen],
            "base": [round(span.start - origin, 4) for span in chosen],
            "x": [round(span.end - span.start, 4) for span in chosen],
            "hovertemplate": "%{x:.3g} s from %{base:.3g} s",
        }
        data.append(trace)
    layout = axes("The last steps, role by role", "seconds", "")
    layout["yaxis"] |= {"categoryorder": "array", "categoryarray": list(reversed(roles))}
    return {"data": data, "layout": layout | {"barmode": "overlay", "bargap": 0.35, "showlegend": True}}


def waits_table(times: Sequence[RoleTime]) -> DataTable:
    """Return working and waiting shares of the roles in percent."""
    roles = [time.role for time in times]
    rows = [(time.role, _percent(time.busy), *(_percent(time.waited.get(other)) for other in roles)) for time in times]
    return DataTable(["role", "works", *(f"waits for {role}" for role in roles)], rows)


def phase_seconds(phases: Mapping[str, Series]) -> Figure:
    """Return the phases' seconds as stacked areas over steps, the largest at the bottom."""
    ordered = sorted(phases.items(), key=lambda item: -sum(item[1].values))
    data = []
    for name, series in ordered:
        xs, ys = thinned(series).means
        style = {"mode": "lines", "stackgroup": "time", "line": {"width": 0.5}}
        data.append({"type": "scatter", "name": name, "x": xs, "y": ys, **style})
    return {"data": data, "layout": axes("Seconds of a step by phase", "step", "seconds") | {"showlegend": True}}


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 1)
