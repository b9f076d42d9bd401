"""Scorers of responses: sentence BLEU as sacrebleu defines it, and reward functions.

One BLEU object serves all pairs of a process, because building it costs more than a score. The settings are those of
`sacrebleu.sentence_bleu` (exponential smoothing, effective order, no lower-casing), so the numbers are exactly its numbers.
sacrebleu's tokenizer and formula are used. N-grams are counted here, with one `Counter` per text and one per reference, which
makes a score a fifth faster.
"""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from rayrlhf.batch_inference.stored_prompts import whole_prompt
from rayrlhf.config.reward import RewardSection
from rayrlhf.data.words import han_share, unspaced_share
from rayrlhf.errors import UserError
from rayrlhf.rewards.functions import ScoringBatch, load_functions
from rayrlhf.rewards.score import score_batch

if TYPE_CHECKING:
    from rayrlhf.batch_inference.generation import Response

Aggregate = Literal["mean", "max"]
AUTO, AUTO_NAMES = "auto", ("auto", "zh", "char")
_Counts = Counter[tuple[str, ...]]


class BleuScorer:
    """Scores hypotheses against one reference each."""

    def __init__(self, tokenize: str = "auto") -> None:
        """Load the tokenizer.

        Args:
            tokenize: sacrebleu's name, or `auto`: `13a`, but `zh` or `char` for a reference mostly in a script without blanks.

        Raises:
            UserError: the tokenizer has to be downloaded and cannot be.
        """
        from sacrebleu.metrics import BLEU

        try:
            names = {name: "13a" if name == AUTO else name for name in (AUTO_NAMES if tokenize == AUTO else (tokenize,))}
            metrics = {name: BLEU(tokenize=own, effective_order=True) for name, own in names.items()}
        except OSError as error:
            raise UserError(
                f"BLEU tokenizer {tokenize}: sacrebleu cannot download it ({error}); "
                "expected a network, or 13a, intl, zh, char or none"
            ) from error
        self._metric: Any = metrics[tokenize]
        self._tokenizers = {name: metric.tokenizer for name, metric in metrics.items()}
        self._tokenize = tokenize
        self._orders = range(1, self._metric.max_ngram_order + 1)

    def score(self, hypothesis: str, reference: str) -> float:
        """Return the sentence BLEU in [0, 100]; 0 where either side is empty."""
        return self.scores([hypothesis], reference)[0]

    def scores(self, hypotheses: Sequence[str], reference: str) -> list[float]:
        """Return the score of each hypothesis against the one reference."""
        name = self._tokenize if self._tokenize != AUTO else tokenizer_of(reference)
        counted = self._count(reference, name)
        return [self._score(*self._count(hypothesis, name), *counted) for hypothesis in hypotheses]

    def _count(self, text: str, name: str) -> tuple[int, _Counts]:
        """Return the number of tokens, and the counts of the n-grams of all orders."""
        tokens = self._tokenizers[name](text.rstrip()).split()
        shifted = [tokens[start:] for start in range(self._metric.max_ngram_order)]
        return len(tokens), Counter(chain.from_iterable(zip(*shifted[:order], strict=False) for order in self._orders))

    def _score(self, length: int, found: _Counts, reference_length: int, reference: _Counts) -> float:
        correct = [0 for _ in self._orders]
        for gram in found.keys() & reference.keys():
            correct[len(gram) - 1] += min(found[gram], reference[gram])
        result = self._metric.compute_bleu(
            correct=correct,
            total=[max(length - order + 1, 0) for order in self._orders],
            sys_len=length,
            ref_len=reference_length,
            smooth_method=self._metric.smooth_method,
            smooth_value=self._metric.smooth_value,
            effective_order=self._metric.effective_order,
            max_ngram_order=self._metric.max_ngram_order,
        )
        return float(result.score)

    @property
    def signature(self) -> str:
        """Signature of the settings by sacrebleu, `nrefs:1|case:mixed|eff:yes|tok:13a|smooth:exp|version:...`."""
        self._metric.num_refs = 1  # sacrebleu sets it at the first score.
        signature = str(self._metric.get_signature())
        return signature.replace("tok:13a", "tok:13a, zh or char by script") if self._tokenize == AUTO else signature


class ChrfScorer:
    """Scores hypotheses by chrF (Popović 2015), the F-score of character n-grams, which needs no words."""

    def __init__(self) -> None:
        from sacrebleu.metrics import CHRF

        self._metric: Any = CHRF()

    def scores(self, hypotheses: Sequence[str], reference: str) -> list[float]:
        """Return the sentence chrF2 of each hypothesis in [0, 100], as `sacrebleu.sentence_chrf` does."""
        return [float(self._metric.sentence_score(hypothesis, [reference]).score) for hypothesis in hypotheses]


def tokenizer_of(text: str) -> str:
    """Return the name of sacrebleu's tokenizer for a text.

    `zh` for Chinese, `char` for another script without blanks, else `auto`, which is 13a.
    """
    if text.isascii() or unspaced_share([text]) <= 0.5:
        return AUTO
    return "zh" if han_share(text) > 0.8 else "char"


def aggregate(scores: Sequence[float], how: Aggregate) -> float:
    """Return the mean or the maximum of a pair's scores.

    Raises:
        ValueError: no scores.
    """
    if not scores:
        raise ValueError("no scores to aggregate")
    return max(scores) if how == "max" else sum(scores) / len(scores)


class Verifier:
    """Weighted sum of reward functions, which get the row's other fields as columns."""

    def __init__(self, section: RewardSection) -> None:
        """Resolve the functions.

        Raises:
            UserError: a function cannot be resolved.
        """
        self._functions = load_functions(section)
        self._timeout_seconds = section.timeout_seconds

    def scores(self, rows: Sequence[dict[str, Any]], responses: "Sequence[Response]") -> list[float]:
        """Return the score of one response to each row.

        Raises:
            UserError: a function raised, or returned something other than a finite number.
        """
        fields = [json.loads(row["columns"]) for row in rows]
        names = sorted({name for row in fields for name in row})
        prompts = [whole_prompt(row) for row in rows]
        batch = ScoringBatch(
            prompts=[row["prompt"] for row in rows],
            responses=[response.text for response in responses],
            columns={name: [row.get(name) for row in fields] for name in names},
            finish_reasons=[response.finish_reason for response in responses],
            messages=[None if isinstance(prompt, str) else prompt for prompt in prompts],
        )
        scored = score_batch(self._functions, batch, timeout_seconds=self._timeout_seconds)
        return [float(score) for score in scored.scores]
