"""Charts as plain Plotly dictionaries; colors come from the page's style sheet.

Names and axis titles must be constants of the program, as Plotly interprets a few tags in them. The page escapes the title.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

Figure = dict[str, Any]


def histogram(
    counts: Sequence[int], edges: Sequence[float], *, title: str, x: str, y: str, mark: float | None = None
) -> Figure:
    """Return bars over intervals, with a dashed vertical line at `mark`.

    Args:
        counts: [N].
        edges: [N + 1], increasing.
        mark: position of the line; None for no line.
    """
    intervals = list(pairwise(edges))
    trace = {
        "type": "bar",
        "x": [(low + high) / 2 for low, high in intervals],
        "y": list(counts),
        "width": [high - low for low, high in intervals],
        "customdata": [f"{low:g} to {high:g}" for low, high in intervals],
        "hovertemplate": "%{customdata}: %{y}<extra></extra>",
    }
    shapes = [] if mark is None else [{"type": "line", "x0": mark, "x1": mark, "yref": "paper", "y0": 0, "y1": 1}]
    return {"data": [trace], "layout": axes(title, x, y) | {"bargap": 0, "shapes": shapes}}


def bars(series: Mapping[str, Sequence[float]], names: Sequence[str], *, title: str, y: str) -> Figure:
    """Return grouped bars: one group per name, one color per series."""
    data = [{"type": "bar", "name": label, "x": list(names), "y": list(values)} for label, values in series.items()]
    return {"data": data, "layout": axes(title, "", y) | {"barmode": "group", "showlegend": len(data) > 1}}


def shares(parts: Mapping[str, int], *, title: str) -> Figure:
    """Return a horizontal bar of parts of a whole, labeled with count and percentage."""
    total = sum(parts.values()) or 1
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": f"{name} {count / total:.1%}",
            "x": [count],
            "y": [""],
            "hovertemplate": f"{name}: {count} of {total}<extra></extra>",
        }
        for name, count in parts.items()
    ]
    layout = axes(title, "pairs", "") | {"barmode": "stack", "showlegend": True}
    return {"data": data, "layout": layout}


def lines(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str, x: str, y: str) -> Figure:
    """Return one line per series of (x values, y values)."""
    data = [
        {"type": "scatter", "mode": "lines", "name": label, "x": list(xs), "y": list(ys)} for label, (xs, ys) in series.items()
    ]
    return {"data": data, "layout": axes(title, x, y) | {"showlegend": len(data) > 1}}


def points(xs: Sequence[float], ys: Sequence[float], *, title: str, x: str, y: str) -> Figure:
    """Return a scatter plot."""
    marker = {"size": 5, "opacity": 0.45}
    trace = {"type": "scatter", "mode": "markers", "x": list(xs), "y": list(ys), "marker": marker}
    return {"data": [trace], "layout": axes(title, x, y) | {"showlegend": False}}


def constant_range(values: Iterable[float]) -> list[float] | None:
    """Return an axis range with 0 for equal values; None for others.

    Plotly would center it on the value with a height of 2, so that a learning rate lies on 0.
    """
    found = set(values)
    value = found.pop() if len(found) == 1 else 0.0
    return None if value == 0 or found else sorted([0.0, 2 * value])


def axes(title: str, x: str, y: str) -> dict[str, Any]:
    """Return a layout with chart and axis titles; an empty string means no title."""
    return {"title": title, "xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
