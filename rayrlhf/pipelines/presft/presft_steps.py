"""Steps of a round over part files: score, select, relabel."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayrlhf.batch_inference.generation import GenerationPlan, generator_pool
from rayrlhf.batch_inference.part_pipeline import Limits, Pool, Stage, run_pipeline
from rayrlhf.batch_inference.parts import PartFolder
from rayrlhf.batch_inference.scoring import BleuScorer
from rayrlhf.batch_inference.stage_resources import cluster_resources
from rayrlhf.config.model import ModelSection
from rayrlhf.config.pipelines import PreSFTConfig, ProbeSection, RelabelSection
from rayrlhf.errors import UserError
from rayrlhf.pipelines.presft.probing import ProbeGenerator, ProbeScorer, correlation, given_probes
from rayrlhf.pipelines.presft.relabeling import CandidateGenerator, PairDecider, ProbesAsCandidates, with_candidates
from rayrlhf.pipelines.presft.selection import Cut, find_cut, needs_candidates
from rayrlhf.storage.atomic import write_atomically
from rayrlhf.storage.notes import read_note, reading

Done = Callable[[int], None]
"""Called with the rows of each written part."""


@dataclass(frozen=True, slots=True)
class LabeledModel:
    """A model to generate with, and its name in tables."""

    label: str
    model: ModelSection


def score_pairs(
    config: PreSFTConfig,
    rows: PartFolder,
    scores: PartFolder,
    model: LabeledModel | None,
    probe: ProbeSection,
    step: int,
    done: Done,
) -> None:
    """Generate probes for every prompt, and score them against the originals.

    Args:
        scores: folder of pairs with probes and scores.
        model: generates the probes; None where the rows provide them.
        step: index of this pass over the data, for the seeds.
        done: called with the rows of each part.
    """
    if scores.sealed:
        return
    plan = None if model is None else _plan(config, model, step, probe.samples, probe.temperature)
    resources = cluster_resources(config.pipeline, config.generate, generating=plan is not None)
    first: Stage = given_probes if plan is None else generator_pool("probe", ProbeGenerator, plan, resources)
    scorer = Pool("score", ProbeScorer, (probe, config.data, plan), resources.scorers, resources.scorer_cpus)
    run_pipeline(rows, scores, [first, scorer], _limits(config), done)
    scores.seal(_score_facts(scores, BleuScorer(probe.tokenize).signature))


def low_score_warning(facts: dict[str, Any]) -> str | None:
    """Return a warning if most responses share no word with the originals, or None.

    Args:
        facts: sealed facts of complete scores.
    """
    if facts.get("zero_bleu", 0) <= facts["rows"] / 2:
        return None
    share = f"{facts['zero_bleu']} of {facts['rows']} pairs have BLEU 0, the two responses share no word"
    return f"{share}: check the chat template, generate.max_new_tokens and probe.tokenize"


def select_pairs(config: PreSFTConfig, scores: PartFolder, selection: Path) -> dict[str, Any]:
    """Find the cut, write it, and return it with counts.

    It needs 16 bytes of memory per row.

    Raises:
        UserError: the scores are incomplete.
    """
    if not scores.sealed:
        raise UserError(f"{scores.path}: the scores are missing or incomplete; run `rayrlhf presft score` first")
    bleu, rows = _column(scores, "bleu", np.float64), _column(scores, "row", np.int64)
    cut = find_cut(config.select, bleu, rows)
    selected = (bleu < cut.score) | ((bleu == cut.score) & (rows <= cut.row))
    facts = {
        "rule": config.select.rule,
        "value": config.select.value,
        "score": cut.score,
        "row": cut.row,
        "selected": int(selected.sum()),
        "of": len(bleu),
        "mean_bleu_selected": float(bleu[selected].mean()) if selected.any() else None,
        "mean_bleu_others": float(bleu[~selected].mean()) if not selected.all() else None,
    }
    write_atomically(selection, json.dumps(facts, indent=1) + "\n")
    return facts


def read_cut(selection: Path) -> Cut:
    """Read the cut of `select_pairs`.

    Raises:
        UserError: there is none.
    """
    if not selection.is_file():
        raise UserError(f"{selection}: there is no selection yet; run `rayrlhf presft select` first")
    remedy = "`rayrlhf presft select` writes it again"
    facts = read_note(selection, remedy)
    with reading(selection, remedy):
        return Cut(facts["score"], facts["row"])


def relabel_pairs(
    config: PreSFTConfig,
    relabel: RelabelSection,
    scores: PartFolder,
    relabeled: PartFolder,
    cut: Cut,
    model: LabeledModel | None,
    step: int,
    done: Done,
) -> None:
    """Generate candidates for the struggling pairs, and decide on every pair.

    Args:
        model: generates candidates; may be None where nothing is sampled.
        step: index of this pass over the data, for the seeds.
        done: called with the rows of each part.
    """
    if relabeled.sealed:
        return
    reuse = relabel.method == "greedy" and (config.probe.temperature == 0 or config.probe.response_field is not None)
    sampling = needs_candidates(relabel) and not reuse
    temperature = 0.0 if relabel.method == "greedy" else relabel.temperature
    plan = None if model is None else _plan(config, model, step, relabel.samples, temperature)
    resources = cluster_resources(config.pipeline, config.generate, generating=sampling)
    first: Stage
    if not needs_candidates(relabel):
        first = partial(with_candidates, candidates={})
    elif sampling:
        assert plan is not None
        first = generator_pool("relabel", CandidateGenerator, plan, resources, (cut,))
    else:
        first = ProbesAsCandidates(cut)
    arguments = (relabel, config.probe, config.data, plan if sampling else None, cut)
    decider = Pool("decide", PairDecider, arguments, resources.scorers, resources.scorer_cpus)
    run_pipeline(scores, relabeled, [first, decider], _limits(config), done)
    relabeled.seal({"reused_probe": reuse, "method": relabel.method, "samples": relabel.samples})


def _plan(config: PreSFTConfig, model: LabeledModel, step: int, samples: int, temperature: float) -> GenerationPlan:
    return GenerationPlan(
        label=model.label,
        model=model.model,
        generate=config.generate,
        data=config.data,
        seed=config.run.seed,
        step=step,
        samples=samples,
        temperature=temperature,
    )


def _limits(config: PreSFTConfig) -> Limits:
    return Limits(config.pipeline.max_restarts, config.pipeline.stall_seconds)


def _column(parts: PartFolder, name: str, kind: object) -> NDArray[Any]:
    pieces: list[NDArray[Any]] = [table.column(name).to_numpy() for table in parts.tables([name])]
    column: NDArray[Any] = np.concatenate(pieces).astype(kind, copy=False)
    return column


def _score_facts(scores: PartFolder, signature: str) -> dict[str, Any]:
    """Return the facts of complete scores; a few numbers per row are in memory."""
    import pyarrow.compute as pc

    bleu, nothing, tokens, rows = 0.0, 0, 0, 0
    chrf: list[float] = []
    for table in scores.tables():
        rows += table.num_rows
        bleu += float(pc.sum(table.column("bleu")).as_py())
        if "chrf" in table.column_names:
            chrf += table.column("chrf").drop_null().to_pylist()
        nothing += int(pc.sum(pc.equal(table.column("bleu"), 0.0)).as_py())
        tokens += int(pc.sum(pc.list_flatten(table.column("probe_tokens"))).as_py() or 0)
    facts = {
        "rows": rows,
        "signature": signature,
        "mean_bleu": bleu / rows,
        "mean_chrf": sum(chrf) / len(chrf) if chrf else None,
    }
    facts |= {"zero_bleu": nothing, "probe_tokens": tokens}
    likelihood = _column(scores, "likelihood", np.float64)
    if not np.isnan(likelihood).any():
        facts["likelihood_correlation"] = correlation(list(likelihood), list(_column(scores, "bleu", np.float64)))
    return facts
