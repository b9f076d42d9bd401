"""HTML report of a Pre-SFT run from its folder: scores, decisions, cost and quality.

`rayrlhf report RUN` calls it without a lock on the folder. Rounds are read part by part.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.pipelines import PreSFTConfig
from rayrlhf.errors import UserError
from rayrlhf.observe.html.charts import bars, histogram, points, shares
from rayrlhf.observe.html.page import Block, Chart, DataTable, Heading, Paragraph, SideBySide, Tiles, write_page
from rayrlhf.pipelines.presft.presft_folder import Layout, RoundFolder
from rayrlhf.pipelines.presft.selection import HIGHEST
from rayrlhf.storage.notes import read_note

BINS = 50
MAX_POINTS = 2000
MAX_STRUGGLING = 100


@dataclass(frozen=True, slots=True)
class RoundView:
    """Plot data of one round.

    Attributes:
        counts: pairs per BLEU bin.
        edges: bin edges, one more than bins.
        lengths: characters of the original response, for evenly spaced pairs.
        scores: BLEU of the same pairs.
        lowest: rows with the lowest scores, ascending.
    """

    counts: Sequence[int]
    edges: Sequence[float]
    lengths: Sequence[int]
    scores: Sequence[float]
    lowest: Sequence[dict[str, Any]]


def read_round(folder: RoundFolder, figures: dict[str, Any]) -> RoundView:
    """Read a round from its decisions, or from its scores before there are any."""
    edges = np.linspace(0.0, HIGHEST, BINS + 1)
    counts = np.zeros(BINS, dtype=np.int64)
    lowest: list[tuple[float, int, dict[str, Any]]] = []
    lengths: list[int] = []
    scores: list[float] = []
    step = max(1, -(-figures["rows"] // MAX_POINTS))
    parts = folder.relabeled if folder.relabeled.sealed else folder.scores
    for table in parts.tables():
        counts += np.histogram(np.minimum(table.column("bleu").to_numpy(), HIGHEST), bins=edges)[0]
        order = np.argsort(table.column("bleu").to_numpy(), kind="stable")[:MAX_STRUGGLING]
        for row in table.take(order).to_pylist():
            heapq.heappush(lowest, (-row["bleu"], -row["row"], row))
            if len(lowest) > MAX_STRUGGLING:
                heapq.heappop(lowest)
        sampled = table.filter(np.asarray(table.column("row").to_numpy()) % step == 0)
        lengths += [len(response) for response in sampled.column("response").to_pylist()]
        scores += sampled.column("bleu").to_pylist()
    rows = [row for _, _, row in sorted(lowest, key=lambda entry: (-entry[0], -entry[1]))]
    return RoundView(counts.tolist(), edges.tolist(), lengths, scores, rows)


def write_report(config: PreSFTConfig, layout: Layout, sheet: dict[str, Any], output: Path | None = None) -> Path:
    """Write the page from the datasheet and the round folders, and return its path.

    Args:
        sheet: the content of `datasheet.json`.
        output: the file; `report.html` in the run folder when None.
    """
    path = output or layout.path / "report.html"
    blocks: list[Block] = list(_summary(sheet))
    for figures in sheet["rounds"]:
        blocks += _round(figures, read_round(layout.round(figures["round"]), figures), len(sheet["rounds"]) > 1)
    blocks += _quality(config, sheet)
    blocks += _data(sheet)
    usable = sheet["dataset"]["usable"]
    write_page(
        path,
        f"Pre-SFT: {config.run.name}",
        f"{config.data.path}, {usable:,} pairs, {config.model.path}",
        blocks,
    )
    return path


def _summary(sheet: dict[str, Any]) -> Iterator[Block]:
    if not sheet["rounds"]:
        return
    last = sheet["rounds"][-1]
    figures = [("pairs scored", f"{last['rows']:,}"), ("mean BLEU", f"{last['mean_bleu']:.1f}")]
    if last.get("mean_chrf") is not None:
        figures.append(("mean chrF", f"{last['mean_chrf']:.1f}"))
    if "struggling" in last:
        figures.append(("struggling", f"{last['struggling'] / last['rows']:.1%}"))
        replaced = last["decisions"].get("replace", 0) + last["decisions"].get("mix", 0)
        figures.append(("got a new response", f"{replaced:,}"))
    if last["tokens"]["rft_4"]:
        figures.append(("tokens sampled", f"{last['tokens']['total']:,}"))
        figures.append(("of what RFT samples at k = 4", f"{last['tokens']['total'] / last['tokens']['rft_4']:.0%}"))
    quality = sheet["quality"]
    if len(quality) > 1:
        name = "score" if "score" in quality[0] else "bleu"
        figures.append(("held-out quality", f"{quality[0][name]:.3g} → {quality[-1][name]:.3g}"))
    yield Tiles(figures)


def _round(figures: dict[str, Any], view: RoundView, several: bool) -> Iterator[Block]:
    prefix = f"Round {figures['round']}: " if several else ""
    yield Heading(f"{prefix}Scores of the pairs")
    cut = figures.get("selection", {}).get("score")
    yield Chart(
        histogram(view.counts, view.edges, title="Pairs by score", x="sentence BLEU", y="pairs", mark=cut),
        f"{figures['rows']:,} pairs by BLEU between the dataset's response and the model's own."
        + (f" Pairs left of the line at {cut:.1f} struggle." if cut is not None else ""),
    )
    yield Chart(
        points(view.lengths, view.scores, title="Score and length", x="characters of the response", y="BLEU"),
        f"BLEU against the length of the dataset's response, {len(view.scores):,} pairs.",
    )
    if figures["likelihood_correlation"] is not None:
        yield Paragraph(
            f"The mean log-probability that the tuned model gives the original responses correlates with BLEU at "
            f"{figures['likelihood_correlation']:.2f} (Pearson)."
        )
    yield from _decisions(figures, prefix)
    yield from _cost(figures, prefix)
    yield from _pairs(view, prefix)
    if figures.get("zero_bleu"):
        yield Paragraph(
            f"BLEU is 0, the two responses share no word, for {figures['zero_bleu']:,} of {figures['rows']:,} pairs.", note=True
        )
    yield Paragraph(f"Scores: sacrebleu, {figures['bleu_signature']}. Model: {figures['model']}.", note=True)


def _decisions(figures: dict[str, Any], prefix: str) -> Iterator[Block]:
    if "decisions" not in figures:
        return
    yield Heading(f"{prefix}Decisions")
    decisions, guarded = figures["decisions"], sum(figures["guarded"].values())
    learned = figures["rows"] - figures["struggling"]
    parts = {"learned: kept": learned, "replaced": decisions.get("replace", 0), "mixed": decisions.get("mix", 0)}
    parts["rejected by the guard"] = guarded
    parts["struggling: kept or dropped"] = figures["rows"] - sum(parts.values())
    yield Chart(shares({name: count for name, count in parts.items() if count}, title="Decisions"), "Shares of all pairs.")
    if figures["guarded"]:
        yield DataTable(["Reason of the guard", "pairs"], list(figures["guarded"].items()))


def _cost(figures: dict[str, Any], prefix: str) -> Iterator[Block]:
    tokens = figures["tokens"]
    if not tokens["rft_4"]:
        return
    yield Heading(f"{prefix}Cost")
    names = ["this run", "RFT, k = 4", "RFT, k = 8"]
    values = {"probes": [tokens["probe"], 0, 0], "new responses": [tokens["relabel"] or 0, 0, 0]}
    values["RFT (estimated)"] = [0, tokens["rft_4"], tokens["rft_8"]]
    figure = bars(values, names, title="Tokens sampled", y="tokens")
    figure["layout"]["barmode"] = "stack"
    yield Chart(
        figure, "Rejection-sampling fine-tuning samples k responses for every prompt; estimated with the probes' length."
    )


def _pairs(view: RoundView, prefix: str) -> Iterator[Block]:
    yield Heading(f"{prefix}The pairs that struggle most")
    for row in view.lowest[:10]:
        facts = [f"BLEU {row['bleu']:.1f}", f"row {row['source']} of the dataset"]
        if "decision" in row:
            facts.append(f"{row['decision']}: {row['reason']}")
        new = row.get("new_response")
        right = ("the model's probe", row["probes"][0]) if new is None else ("new response", new)
        yield SideBySide(facts, ("prompt", row["prompt"]), ("original", row["response"]), right)
    rows = [
        (row["source"], row["bleu"], row.get("decision", ""), row["prompt"], row["response"], row["probes"][0])
        for row in view.lowest
    ]
    yield Paragraph(f"The {len(rows)} lowest scores (at most {MAX_STRUGGLING}):")
    yield DataTable(["row", "BLEU", "decision", "prompt", "original", "probe"], rows, filterable=True)


def _quality(config: PreSFTConfig, sheet: dict[str, Any]) -> Iterator[Block]:
    if not sheet["quality"] and not sheet["losses"]:
        return
    yield Heading("Loss and quality before and after")
    quality = {facts["model"]: facts for facts in sheet["quality"]}
    columns = {"loss": "last training loss", "evaluation/loss": "held-out loss", "score": "verifier's mean score"}
    columns["bleu"] = "held-out mean BLEU"
    models = list(dict.fromkeys([*sheet["losses"], *quality]))
    facts = {model: sheet["losses"].get(model, {}) | quality.get(model, {}) for model in models}
    shown = [name for name in columns if any(name in facts[model] for model in models)]
    rows = [[model, *(facts[model].get(name) for name in shown)] for model in models]
    yield DataTable(["model", *(columns[name] for name in shown)], rows)
    yield Paragraph("The model named tuned learned from the original dataset. Losses are nats per token.", note=True)
    if quality:
        temperature = config.quality.temperature if config.quality else 0.0
        how = f"at temperature {temperature:g}" if temperature else "greedy"
        count = next(iter(quality.values()))["rows"]
        yield Paragraph(f"Quality: one response to each of {count:,} held-out prompts, {how}.", note=True)


def _data(sheet: dict[str, Any]) -> Iterator[Block]:
    dataset = sheet["dataset"]
    yield Heading("The dataset")
    yield Paragraph(f"{dataset['path']}: {dataset['read']:,} rows read, {dataset['usable']:,} usable.")
    if dataset["rejected"]:
        yield DataTable(["Reason of rejection", "rows"], list(dataset["rejected"].items()))


def write_presft_report(folder: Path, output: Path | None = None) -> Path:
    """Write the page from the stored datasheet, and return its path.

    Args:
        output: the file; `report.html` in the run folder when None.

    Raises:
        UserError: no datasheet, or a damaged datasheet or configuration.
    """
    sheet = folder / "datasheet.json"
    if not sheet.is_file():
        raise UserError(f"{folder}: no datasheet.json yet; `rayrlhf presft report CONFIG` writes it and the report")
    figures = read_note(sheet, "`rayrlhf presft report CONFIG` writes it again")
    config = load_config(PreSFTConfig, folder / "config.yaml")
    return write_report(config, Layout(folder), figures, output)
