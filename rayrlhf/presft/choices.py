"""Which of n candidates a struggling prompt gets: the one with the highest score, the earliest among equals.

What the score is depends on the method. Minimum Bayes risk (Kumar and Byrne 2004; Eikema and Aziz 2020) takes the candidate
closest to all others, here by mean sentence BLEU with the other candidate as the reference; it needs neither model nor
verifier.
"""

from collections.abc import Sequence

from rayrlhf.presft.bleu import BleuScorer


def agreement(candidates: Sequence[str], scorer: BleuScorer) -> list[float]:
    """Return each candidate's mean BLEU to the other candidates, in [0, 100]; 0 for a single candidate."""
    others = len(candidates) - 1
    if others < 1:
        return [0.0] * len(candidates)
    table: dict[tuple[str, str], float] = {}
    for hypothesis in set(candidates):
        for reference in set(candidates):
            table[hypothesis, reference] = scorer.score(hypothesis, reference)
    return [
        sum(table[candidate, other] for place, other in enumerate(candidates) if place != index) / others
        for index, candidate in enumerate(candidates)
    ]


def best(scores: Sequence[float], allowed: Sequence[bool]) -> int | None:
    """Return the index of the highest score among allowed candidates, or None when none is allowed.

    Raises:
        ValueError: a score for something else than every candidate.
    """
    ranked = [(-score, index) for index, (score, fine) in enumerate(zip(scores, allowed, strict=True)) if fine]
    return min(ranked)[1] if ranked else None
