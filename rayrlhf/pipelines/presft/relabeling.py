"""Stages of the second pass: candidates for struggling pairs, decisions on all pairs."""

import json
from typing import TYPE_CHECKING, Any

from rayrlhf.batch_inference.generation import BatchGenerator, GenerationPlan, Response
from rayrlhf.batch_inference.scoring import BleuScorer, Verifier
from rayrlhf.batch_inference.stored_prompts import whole_prompt
from rayrlhf.config.batch_inference import PairsSection
from rayrlhf.config.pipelines import ProbeSection, RelabelSection
from rayrlhf.library_types import ArrowTable
from rayrlhf.pipelines.presft.probing import LikelihoodEngine, sampling_text, with_columns
from rayrlhf.pipelines.presft.selection import LEARNED, Candidate, Cut, Decision, agreement, decide, refusal

if TYPE_CHECKING:
    from rayrlhf.engines.scoring.reward_ensemble import RewardEnsemble

CANDIDATES = "_candidates"
"""Column of JSON with candidates, read by `PairDecider`."""
Row = dict[str, Any]


class CandidateGenerator:
    """Generates candidates for the struggling pairs of a part."""

    def __init__(self, plan: GenerationPlan, cut: Cut) -> None:
        """Start the rollout engine."""
        self._generator = BatchGenerator(plan)
        self._cut = cut

    def __call__(self, table: ArrowTable) -> ArrowTable:
        """Return the part with its candidates."""
        rows = table.to_pylist()
        struggling = [index for index, row in enumerate(rows) if self._cut.selects(row["bleu"], row["row"])]
        answers = self._generator.generate([rows[index] for index in struggling])
        return with_candidates(table, dict(zip(struggling, answers, strict=True)))


class ProbesAsCandidates:
    """Uses the probes as candidates, without sampling."""

    def __init__(self, cut: Cut) -> None:
        """Keep the cut."""
        self._cut = cut

    def __call__(self, table: ArrowTable) -> ArrowTable:
        """Return the part with its candidates, which count as 0 tokens."""
        candidates = {
            index: [Response(text, finish, 0) for text, finish in zip(row["probes"], row["probe_finish"], strict=True)]
            for index, row in enumerate(table.to_pylist())
            if self._cut.selects(row["bleu"], row["row"])
        }
        return with_candidates(table, candidates)


def with_candidates(table: ArrowTable, candidates: dict[int, list[Response]]) -> Any:
    """Return a part with a JSON column of candidates, given by row index."""
    import pyarrow as pa

    texts = [
        json.dumps([(response.text, response.finish_reason, response.tokens) for response in candidates.get(index, [])])
        for index in range(table.num_rows)
    ]
    return table.append_column(CANDIDATES, pa.array(texts, pa.string()))


class PairDecider:
    """Decides on every pair of a part."""

    _reward_model: "RewardEnsemble | None" = None
    _likelihood: LikelihoodEngine | None = None

    def __init__(
        self, relabel: RelabelSection, probe: ProbeSection, data: PairsSection, plan: GenerationPlan | None, cut: Cut
    ) -> None:
        """Load the models and functions of the method.

        Raises:
            UserError: a reward function or model cannot be loaded.
        """
        self._relabel, self._cut = relabel, cut
        self._bleu = BleuScorer(probe.tokenize)
        self._verifier = Verifier(relabel.verifier) if relabel.verifier is not None else None
        if relabel.method == "reward_model" and relabel.reward_model is not None:
            from rayrlhf.engines.scoring.reward_ensemble import RewardEnsemble

            self._reward_model = RewardEnsemble(relabel.reward_model)
        if relabel.method == "likelihood" and plan is not None:
            self._likelihood = LikelihoodEngine(plan, data)
        self._plan = plan

    def __call__(self, table: ArrowTable) -> ArrowTable:
        """Return the part with the decision on each pair and its provenance."""
        rows = table.to_pylist()
        flat: list[tuple[Row, Response]] = []
        for row in rows:
            row["responses"] = [Response(*fields) for fields in json.loads(row[CANDIDATES])]
            flat += [(row, response) for response in row["responses"]]
        verified = self._verified(flat)
        scores = iter(self._scores(rows, flat, verified))
        verdicts = iter(verified)
        decided = []
        for row in rows:
            count = len(row["responses"])
            own_scores = [next(scores) for _ in range(count)]
            refusals = [self._refusal(response, next(verdicts)) for response in row["responses"]]
            decided.append(self._decide(row, own_scores, refusals))
        columns = {name: [row[name] for row in decided] for name in decided[0]} if decided else {}
        return with_columns(table, "relabeled", columns)

    def _decide(self, row: Row, scores: list[float], refusals: list[str | None]) -> Row:
        texts = [response.text for response in row["responses"]]
        struggling = self._cut.selects(row["bleu"], row["row"])
        decision: Decision = LEARNED
        if struggling:
            candidates = [Candidate(*fields) for fields in zip(texts, scores, refusals, strict=True)]
            decision = decide(self._relabel, row["response"], candidates)
        return {
            "struggling": struggling,
            "decision": decision.action,
            "reason": decision.reason,
            "new_response": None if decision.chosen is None else texts[decision.chosen],
            "guarded": decision.guarded,
            "candidates": texts,
            "candidate_scores": scores,
            "refusals": [refused or "" for refused in refusals],
            "new_tokens": sum(response.tokens for response in row["responses"]),
            "relabel_model": self._plan.label if texts and self._plan is not None else row["model"] if texts else None,
            "relabel_sampling": sampling_text(self._plan) if texts and self._plan is not None else None,
        }

    def _verified(self, flat: list[tuple[Row, Response]]) -> list[float | None]:
        if self._verifier is None or not flat:
            return [None] * len(flat)
        responses = [response for _, response in flat]
        return list(self._verifier.scores([row for row, _ in flat], responses))

    def _scores(self, rows: list[Row], flat: list[tuple[Row, Response]], verified: list[float | None]) -> list[float]:
        """Return the method's score of each candidate of the part."""
        if self._relabel.method == "mbr":
            return [score for row in rows for score in agreement([response.text for response in row["responses"]], self._bleu)]
        if not flat:
            return []
        if self._reward_model is not None:
            texts = [response.text for _, response in flat]
            return [float(score) for score in self._reward_model.score([whole_prompt(row) for row, _ in flat], texts)]
        if self._likelihood is not None:
            return self._likelihood.mean_logprobs([row for row, _ in flat], [response.text for _, response in flat])
        if self._relabel.method == "verifier":
            return [float(score or 0.0) for score in verified]
        return [0.0] * len(flat)

    def _refusal(self, response: Response, verifier_score: float | None) -> str | None:
        return refusal(
            response.text,
            response.finish_reason,
            loop_repeats=self._relabel.loop_repeats,
            verifier_score=verifier_score,
            verifier_minimum=self._relabel.verifier_minimum,
        )
