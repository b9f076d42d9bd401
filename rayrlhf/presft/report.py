"""The report of a Pre-SFT run: what the model had learned of the dataset, what was changed, what it cost, what it brought."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rayrlhf.config.presft import PreSFTConfig
from rayrlhf.presft.layout import Layout
from rayrlhf.presft.report_figures import MOST_STRUGGLING, RoundView, read_round
from rayrlhf.report.charts import bars, histogram, points, shares
from rayrlhf.report.page import Block, Chart, DataTable, Heading, Paragraph, SideBySide, Tiles, write_page


def write_report(config: PreSFTConfig, layout: Layout, sheet: dict[str, Any], output: Path | None = None) -> Path:
    """Write the page from the datasheet and the round folders, as far as the run has come; returns its path.

    Args:
        config: of the run.
        layout: of its folder.
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
    yield Heading(f"{prefix}What the model had learned")
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
    yield Paragraph(f"Scores: sacrebleu, {figures['bleu_signature']}. Asked: {figures['model']}.", note=True)


def _decisions(figures: dict[str, Any], prefix: str) -> Iterator[Block]:
    if "decisions" not in figures:
        return
    yield Heading(f"{prefix}What became of the pairs")
    decisions, guarded = figures["decisions"], sum(figures["guarded"].values())
    learned = figures["rows"] - figures["struggling"]
    parts = {"learned: kept": learned, "replaced": decisions.get("replace", 0), "mixed": decisions.get("mix", 0)}
    parts["guard refused"] = guarded
    parts["struggling: kept or dropped"] = figures["rows"] - sum(parts.values())
    yield Chart(shares({name: count for name, count in parts.items() if count}, title="Decisions"), "Shares of all pairs.")
    if figures["guarded"]:
        yield DataTable(["Why the guard refused", "pairs"], list(figures["guarded"].items()))


def _cost(figures: dict[str, Any], prefix: str) -> Iterator[Block]:
    tokens = figures["tokens"]
    if not tokens["rft_4"]:
        return
    yield Heading(f"{prefix}What it cost")
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
    yield Paragraph(f"The {len(rows)} lowest scores (at most {MOST_STRUGGLING}):")
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
    yield Paragraph("The model named tuned learned from the original dataset. Losses are nats a token.", note=True)
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
        yield DataTable(["Why a row was rejected", "rows"], list(dataset["rejected"].items()))
