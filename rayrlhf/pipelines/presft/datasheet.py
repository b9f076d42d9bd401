"""`datasheet.json`: figures of the dataset, the rounds, the decisions and the cost."""

import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rayrlhf.config.pipelines import PreSFTConfig
from rayrlhf.pipelines.presft.presft_folder import Layout, RoundFolder
from rayrlhf.pipelines.presft.quality import read_quality
from rayrlhf.storage.atomic import write_atomically
from rayrlhf.storage.notes import read_note
from rayrlhf.tuning.training_result import read_result

RFT_SAMPLES = (4, 8)
"""Samples per prompt of rejection-sampling fine-tuning (RFT), for the comparison of cost."""


def write_datasheet(config: PreSFTConfig, layout: Layout) -> dict[str, Any]:
    """Write the datasheet of the finished steps, and return it."""
    facts = layout.rows.facts()
    numbers = [number for number in range(1, config.run.rounds + 1) if layout.round(number).scores.sealed]
    labels = [layout.label(number) for number in range(config.run.rounds + 1)]
    summaries = [layout.quality(label).path.with_suffix(".json") for label in labels]
    sheet = {
        "rayrlhf": version("rayrlhf"),
        "name": config.run.name,
        "base_model": config.model.path,
        "dataset": {"path": config.data.path, "read": facts["read"], "usable": facts["rows"], "rejected": facts["rejected"]},
        "rounds": [round_figures(config, layout.round(number), number) for number in numbers],
        "quality": [read_quality(summary) for summary in summaries if summary.is_file()],
        "losses": {label: losses for number, label in enumerate(labels) if (losses := _losses(layout.tuned(number)))},
    }
    write_atomically(layout.path / "datasheet.json", json.dumps(sheet, indent=1, ensure_ascii=False) + "\n")
    return sheet


def round_figures(config: PreSFTConfig, folder: RoundFolder, number: int) -> dict[str, Any]:
    """Return the figures of one round, as far as its steps are done."""
    facts = folder.scores.facts()
    first = next(folder.scores.tables(["model", "sampling"])).slice(0, 1).to_pylist()[0]
    figures: dict[str, Any] = {
        "round": number,
        "model": first["model"],
        "sampling": json.loads(first["sampling"]),
        "rows": facts["rows"],
        "mean_bleu": facts["mean_bleu"],
        "mean_chrf": facts.get("mean_chrf"),
        "zero_bleu": facts.get("zero_bleu"),
        "bleu_signature": facts["signature"],
        "likelihood_correlation": facts.get("likelihood_correlation"),
        "tokens": {"probe": facts["probe_tokens"], "relabel": None, "total": facts["probe_tokens"]},
    }
    if folder.selection.is_file():
        figures["selection"] = read_note(folder.selection)
    if folder.relabeled.sealed:
        figures |= _decisions(folder)
        figures["tokens"] = _tokens(facts["probe_tokens"], figures.pop("new_tokens"))
        figures["method"] = folder.relabeled.facts()["method"]
    responses = facts["rows"] * max(config.probe.samples, 1)
    figures["tokens"] |= rft_tokens(facts["rows"], facts["probe_tokens"], responses)
    return figures


def rft_tokens(rows: int, probe_tokens: int, responses: int) -> dict[str, int | None]:
    """Return the tokens that rejection sampling would sample at each k.

    The estimate is k responses per prompt with the mean length of the probes.

    Args:
        rows: number of prompts.
        probe_tokens: tokens of all probes; 0 where the dataset provides the responses.
        responses: number of probes.
    """
    return {f"rft_{k}": round(k * rows * probe_tokens / responses) if probe_tokens else None for k in RFT_SAMPLES}


def _tokens(probe: int, relabel: int) -> dict[str, int | None]:
    return {"probe": probe, "relabel": relabel, "total": probe + relabel}


def _losses(tuned: Path) -> dict[str, float]:
    """Return the last training loss and the held-out loss; empty for an unfinished run."""
    result = read_result(tuned)
    return {} if result is None else {name: value for name, value in result.metrics.items() if name.endswith("loss")}


def _decisions(folder: RoundFolder) -> dict[str, Any]:
    import pyarrow.compute as pc

    decisions: Counter[str] = Counter()
    guarded: Counter[str] = Counter()
    tokens = struggling = 0
    for table in folder.relabeled.tables(["decision", "reason", "guarded", "new_tokens", "struggling"]):
        decisions.update(table.column("decision").to_pylist())
        guarded.update(table.filter(table.column("guarded")).column("reason").to_pylist())
        tokens += int(pc.sum(table.column("new_tokens")).as_py())
        struggling += int(pc.sum(table.column("struggling")).as_py())
    return {
        "struggling": struggling,
        "decisions": dict(sorted(decisions.items())),
        "guarded": dict(guarded.most_common()),
        "new_tokens": tokens,
        "repaired_rows": folder.repaired.facts()["rows"] if folder.repaired.sealed else None,
    }
