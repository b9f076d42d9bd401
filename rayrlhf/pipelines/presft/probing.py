"""Stages of the first pass: probe every prompt, then score the probes against the originals."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from rayrlhf.batch_inference.generation import BatchGenerator, GenerationPlan
from rayrlhf.batch_inference.ingest import GIVEN
from rayrlhf.batch_inference.scoring import BleuScorer, ChrfScorer, aggregate
from rayrlhf.batch_inference.source import row_schema
from rayrlhf.batch_inference.stored_prompts import encode_prompts, response_sequences
from rayrlhf.config.batch_inference import PairsSection
from rayrlhf.config.pipelines import ProbeSection
from rayrlhf.engines.scoring.frozen import FrozenEngine
from rayrlhf.library_types import ArrowTable, Tokenizer
from rayrlhf.models.load import load_tokenizer


@cache
def schemas() -> dict[str, Any]:
    """Return the Arrow schema of each step's part files by name: probed, scores, relabeled.

    All begin with the columns of `row_schema`; each step adds columns and removes none.
    `probe_finish` is "stop" or "length". `probe_tokens` counts sampled tokens.
    `sampling` and `relabel_sampling` are JSON. `chrf` is null in parts written before version 0.2.
    """
    import pyarrow as pa

    text, texts = pa.string(), pa.list_(pa.string())
    real, reals = pa.float64(), pa.list_(pa.float64())
    probes = [("probes", texts), ("probe_finish", texts), ("probe_tokens", pa.list_(pa.int32()))]
    scores = [("probe_bleu", reals), ("bleu", real), ("chrf", real), ("likelihood", real), ("model", text), ("sampling", text)]
    decision = [
        ("struggling", pa.bool_()),
        ("decision", text),
        ("reason", text),
        ("new_response", text),
        ("guarded", pa.bool_()),
    ]
    candidates = [("candidates", texts), ("candidate_scores", reals), ("refusals", texts), ("new_tokens", pa.int32())]
    made_by = [("relabel_model", text), ("relabel_sampling", text)]
    rows = row_schema()
    return {
        "probed": pa.schema([*rows, *probes]),
        "scores": pa.schema([*rows, *probes, *scores]),
        "relabeled": pa.schema([*rows, *probes, *scores, *decision, *candidates, *made_by]),
    }


def with_columns(table: ArrowTable, name: str, columns: dict[str, list[Any]]) -> Any:
    """Return an Arrow table with further columns, in a step's schema.

    Raises:
        KeyError: a column of the schema is neither in the table nor given.
    """
    import pyarrow as pa

    schema = schemas()[name]
    if "bleu" in table.column_names and "chrf" not in table.column_names:
        columns = {"chrf": [None] * table.num_rows} | columns
    arrays = [
        pa.array(columns[field.name], field.type) if field.name in columns else table.column(field.name) for field in schema
    ]
    return pa.table(arrays, schema=schema)


BATCH_TOKENS = 8192
"""Token budget of one forward pass."""


class LikelihoodEngine:
    """Log-probs of responses under the tuned model."""

    def __init__(self, plan: GenerationPlan, data: PairsSection) -> None:
        """Load the model.

        Raises:
            UserError: the model cannot be loaded.
        """
        self._engine = FrozenEngine(plan.model, BATCH_TOKENS)
        self._tokenizer: Tokenizer = load_tokenizer(plan.model)
        self._data = data
        self._longest = plan.generate.max_model_length or 10**9

    def mean_logprobs(self, rows: Sequence[dict[str, Any]], responses: Sequence[str]) -> list[float]:
        """Return the mean log-prob per response token, in nats at temperature 1, per row."""
        prompts = encode_prompts(
            self._tokenizer,
            self._data,
            [row["prompt"] for row in rows],
            [row["messages"] for row in rows],
            [row["source"] for row in rows],
        )
        sequences = response_sequences(self._tokenizer, prompts, responses, self._longest)
        scores = self._engine.score(sequences, frozenset({"logprobs"}))
        return [float(score.logprobs.mean()) for score in scores if score.logprobs is not None]


class ProbeGenerator:
    """Adds probes, responses of the tuned model, to a part."""

    def __init__(self, plan: GenerationPlan) -> None:
        """Start the rollout engine."""
        self._generator = BatchGenerator(plan)

    def __call__(self, table: ArrowTable) -> ArrowTable:
        """Return the part with `probes`, `probe_finish` and `probe_tokens`."""
        answers = self._generator.generate(table.to_pylist())
        columns: dict[str, list[Any]] = {
            "probes": [[response.text for response in responses] for responses in answers],
            "probe_finish": [[response.finish_reason for response in responses] for responses in answers],
            "probe_tokens": [[response.tokens for response in responses] for responses in answers],
        }
        return with_columns(table, "probed", columns)


def given_probes(table: ArrowTable) -> ArrowTable:
    """Return a part with the dataset's given responses as probes."""
    responses = [json.loads(columns)[GIVEN] for columns in table.column("columns").to_pylist()]
    columns: dict[str, list[Any]] = {
        "probes": [[response] for response in responses],
        "probe_finish": [["stop"]] * len(responses),
        "probe_tokens": [[0]] * len(responses),
    }
    return with_columns(table, "probed", columns)


class ProbeScorer:
    """Adds BLEU and chrF, and optionally the likelihood of the original, to a probed part."""

    _likelihood: "LikelihoodEngine | None" = None

    def __init__(self, probe: ProbeSection, data: PairsSection, plan: GenerationPlan | None) -> None:
        """Load the BLEU tokenizer, and the model for likelihoods if needed."""
        self._probe = probe
        self._bleu, self._chrf = BleuScorer(probe.tokenize), ChrfScorer()
        self._model = "given" if plan is None else plan.label
        self._sampling = "{}" if plan is None else sampling_text(plan)
        if probe.likelihood and plan is not None:
            self._likelihood = LikelihoodEngine(plan, data)

    def __call__(self, table: ArrowTable) -> ArrowTable:
        """Return the part with `probe_bleu`, `bleu`, `chrf`, `likelihood`, `model` and `sampling`."""
        originals, probes = table.column("response").to_pylist(), table.column("probes").to_pylist()
        bleu = [self._bleu.scores(texts, original) for texts, original in zip(probes, originals, strict=True)]
        chrf = [self._chrf.scores(texts, original) for texts, original in zip(probes, originals, strict=True)]
        likelihood: list[float | None] = [None] * len(originals)
        if self._likelihood is not None:
            likelihood = list(self._likelihood.mean_logprobs(table.to_pylist(), originals))
        columns: dict[str, list[Any]] = {
            "probe_bleu": bleu,
            "bleu": [aggregate(scores, self._probe.aggregate) for scores in bleu],
            "chrf": [aggregate(scores, self._probe.aggregate) for scores in chrf],
            "likelihood": likelihood,
            "model": [self._model] * len(originals),
            "sampling": [self._sampling] * len(originals),
        }
        return with_columns(table, "scores", columns)


def sampling_text(plan: GenerationPlan) -> str:
    """Return the sampling parameters as JSON, for the provenance of a row."""
    names = ("seed", "step", "samples", "temperature")
    parameters = {name: getattr(plan, name) for name in names}
    return json.dumps(parameters | {"backend": plan.generate.backend, "max_new_tokens": plan.generate.max_new_tokens})


def correlation(first: list[float], second: list[float]) -> float | None:
    """Return Pearson's correlation, or None where one side is constant."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])
