"""Sentence BLEU as sacrebleu defines it, with the signature that makes a score reproducible.

One metric object serves all pairs of a process: building it costs more than a score. The settings are those of
`sacrebleu.sentence_bleu` (exponential smoothing, effective order, no lower-casing), so the numbers are exactly its numbers.
"""

from collections.abc import Sequence
from typing import Any, Literal

from rayrlhf.errors import UserError

Aggregate = Literal["mean", "max"]


class BleuScorer:
    """Scores hypotheses against one reference each."""

    def __init__(self, tokenize: str = "13a") -> None:
        """Load the tokenizer.

        Raises:
            UserError: the tokenizer has to be downloaded and cannot be.
        """
        from sacrebleu.metrics import BLEU

        try:
            self._metric: Any = BLEU(tokenize=tokenize, effective_order=True)
        except OSError as error:
            raise UserError(
                f"probe.tokenize: sacrebleu has to download the {tokenize} tokenizer and cannot ({error}); "
                "expected a network, or 13a, intl, zh, char or none"
            ) from error

    def score(self, hypothesis: str, reference: str) -> float:
        """Return the sentence BLEU in [0, 100]; 0 where either side is empty."""
        return float(self._metric.sentence_score(hypothesis, [reference]).score)

    def scores(self, hypotheses: Sequence[str], reference: str) -> list[float]:
        """Return the score of each hypothesis against the one reference."""
        return [self.score(hypothesis, reference) for hypothesis in hypotheses]

    @property
    def signature(self) -> str:
        """The record of the settings that sacrebleu makes, `nrefs:1|case:mixed|eff:yes|tok:13a|smooth:exp|version:...`."""
        self._metric.num_refs = 1  # What the first score would set.
        return str(self._metric.get_signature())


def aggregate(scores: Sequence[float], how: Aggregate) -> float:
    """Return one number for a pair's probes.

    Raises:
        ValueError: no scores.
    """
    if not scores:
        raise ValueError("no scores to aggregate")
    return max(scores) if how == "max" else sum(scores) / len(scores)
