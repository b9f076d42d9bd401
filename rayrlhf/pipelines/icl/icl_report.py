"""HTML report of k-curves: the gain of each model from demonstrations, and the ablations."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayrlhf.batch_inference.parts import PartFolder
from rayrlhf.config.icl import ICLEvaluateConfig
from rayrlhf.observe.html.charts import Figure, lines
from rayrlhf.observe.html.page import Block, Chart, DataTable, Heading, Paragraph, SideBySide, Tiles, write_page
from rayrlhf.pipelines.icl.curve import Point

SHOWN_ANSWERS = 3
"""Answers shown per model, at the largest k."""


def write_curve_report(config: ICLEvaluateConfig, points: Sequence[Point], choice: Mapping[str, Any], path: Path) -> None:
    """Write the page.

    Args:
        choice: `leaks`, `repeated` and `short` of the questions' seal.
    """
    blocks = [*_curves(config, points), *_table(points, choice), *_answers(config, path.parent)]
    questions = points[0].questions
    write_page(path, f"In-context learning: {config.run.name}", f"{config.data.path}, {questions:,} questions", blocks)


def _curves(config: ICLEvaluateConfig, points: Sequence[Point]) -> Iterator[Block]:
    plain = [point for point in points if point.ablation == "none"]
    yield Tiles([(f"{model}, k = 0 → best", _gain(plain, model)) for model in config.models])
    yield Heading("Score against the number of demonstrations")
    own = {model: _line(plain, model, "none") for model in config.models}
    figure = _figure(own, "k-curves", config.metric)
    words = "Mean over the questions, with its 95 % interval."
    if config.metric == "accuracy":
        first = next(iter(own.values()))
        control = {"copying an answer": ([point.k for point in first], [point.copying for point in first])}
        figure["data"] += lines(control, title="", x="", y="")["data"]
        figure["layout"]["showlegend"] = True
        words += " The control answers each question with a demonstration's answer drawn at random."
    yield Chart(figure, words)
    ablations = [name for name in config.demonstrations.ablations if name != "none"]
    if ablations:
        yield Heading("Ablations of the demonstrations")
        for model in config.models:
            series: dict[str, list[Point]] = {name: _line(points, model, name) for name in config.demonstrations.ablations}
            yield Chart(
                _figure(series, model, config.metric),
                "flip: answers exchanged by one rule, so the mapping contradicts the truth. format: answers drawn at random, "
                "so only form and labels are left.",
            )


def _table(points: Sequence[Point], choice: Mapping[str, Any]) -> Iterator[Block]:
    yield Heading("All points")
    columns = ["model", "demonstrations are", "k", "mean", "low", "high", "copying", "shown", "dropped", "questions"]
    names = {"none": "as they are", "flip": "flipped", "format": "of random answers"}
    yield DataTable(columns, [[*row[:1], names[str(row[1])], *row[2:]] for row in (list(p.as_row().values()) for p in points)])
    leaks = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in choice["leaks"].items()) or "none"
    yield Paragraph(
        f"Intervals: 95 %, bootstrap over questions. Skipped as leaks: {leaks}; as repeated texts: {choice['repeated']}. "
        f"Questions with fewer demonstrations than requested: {choice['short']}. Dropped: the farthest ones, over the model's "
        "context.",
        note=True,
    )


def _answers(config: ICLEvaluateConfig, folder: Path) -> Iterator[Block]:
    yield Heading("Some answers")
    largest = max(config.demonstrations.counts)
    for name in config.models:
        shown = 0
        for row in PartFolder(folder / "answers" / name).rows():
            if row["k"] != largest or row["ablation"] != "none" or shown == SHOWN_ANSWERS:
                continue
            shown += 1
            facts = [name, f"k = {row['k']}, {row['shown']} shown", f"score {row['score']:.3g}"]
            yield SideBySide(facts, ("question", row["question"]), ("expected", row["answer"]), ("answered", row["text"]))


def _line(points: Sequence[Point], model: str, ablation: str) -> list[Point]:
    """Return a line; k = 0 has no ablation, so all lines share its point."""
    own = [point for point in points if point.model == model and (point.ablation == ablation or point.k == 0)]
    return sorted(own, key=lambda point: point.k)


def _figure(series: Mapping[str, Sequence[Point]], title: str, metric: str) -> Figure:
    """Return lines with error bars."""
    curves = {name: ([float(one.k) for one in own], [one.mean for one in own]) for name, own in series.items()}
    figure = lines(curves, title=title, x="demonstrations", y=metric)
    for trace, own in zip(figure["data"], series.values(), strict=True):
        above, below = [one.high - one.mean for one in own], [one.mean - one.low for one in own]
        trace["error_y"] = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    return figure


def _gain(points: Sequence[Point], model: str) -> str:
    own = sorted((point for point in points if point.model == model), key=lambda point: point.k)
    return f"{own[0].mean:.3f} → {max(point.mean for point in own):.3f}"
