"""Quality of a tuned model on held-out rows: mean BLEU and mean reward."""

import json
from pathlib import Path
from typing import Any

from rayrlhf.batch_inference.generation import Response
from rayrlhf.batch_inference.scoring import Verifier
from rayrlhf.config.pipelines import PreSFTConfig, ProbeSection, QualitySection
from rayrlhf.pipelines.presft.presft_folder import Layout
from rayrlhf.pipelines.presft.presft_steps import Done, LabeledModel, score_pairs
from rayrlhf.storage.atomic import write_atomically
from rayrlhf.storage.notes import read_note

STEP = 1
"""Seeds of held-out responses: the same for every model, and unused by rounds."""


def measure_quality(config: PreSFTConfig, layout: Layout, model: LabeledModel, done: Done) -> dict[str, Any]:
    """Measure the quality once; return `rows`, `bleu` and, with a verifier, `score`.

    Raises:
        UserError: a reward function cannot be loaded, or fails.
    """
    section = config.quality
    assert section is not None
    answers = layout.quality(model.label)
    summary = answers.path.with_suffix(".json")
    if not summary.is_file():
        held_out = config.model_copy(update={"data": section.data})
        probe = ProbeSection(temperature=section.temperature, tokenize=config.probe.tokenize)
        score_pairs(held_out, layout.held_out, answers, model, probe, STEP, done)
        facts = {"model": model.label, "rows": answers.facts()["rows"], "bleu": answers.facts()["mean_bleu"]}
        write_atomically(summary, json.dumps(facts | _verified(section, answers), indent=1) + "\n")
    return read_quality(summary)


def read_quality(summary: Path) -> dict[str, Any]:
    """Return a stored summary."""
    return read_note(summary, "remove it, and the stage runs again")


def _verified(section: QualitySection, answers: Any) -> dict[str, float]:
    if section.verifier is None:
        return {}
    verifier, total, count = Verifier(section.verifier), 0.0, 0
    for table in answers.tables():
        rows = table.to_pylist()
        responses = [Response(row["probes"][0], row["probe_finish"][0], row["probe_tokens"][0]) for row in rows]
        total += sum(verifier.scores(rows, responses))
        count += len(rows)
    return {"score": total / count}
