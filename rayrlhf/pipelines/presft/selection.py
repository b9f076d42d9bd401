"""Selection of struggling pairs by a cut, and decisions on pairs; pure.

A cut orders pairs by (score, row), so that a share of the dataset is met exactly and ties are broken equally in every run.

The guard rejects a new response that is empty, truncated, looping, or below the verifier's minimum. Of n candidates a
struggling prompt gets the one with the highest score, the earliest among ties. The score depends on the method. Minimum Bayes
risk (Kumar and Byrne 2004; Eikema and Aziz 2020) takes the candidate closest to all others, here by mean sentence BLEU with
the other candidates as references; it needs neither model nor verifier.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rayrlhf.batch_inference.scoring import BleuScorer
from rayrlhf.config.pipelines import RelabelSection, SelectSection

HISTOGRAM_BINS = 256
HIGHEST = 100.0


@dataclass(frozen=True, slots=True)
class Cut:
    """Upper bound (`score`, `row`) of selected pairs; `row` -1 excludes that score."""

    score: float
    row: int = -1

    def selects(self, score: float, row: int) -> bool:
        """Return True for a struggling pair."""
        return (score, row) <= (self.score, self.row)


NOTHING = Cut(0.0)
"""Selects no pair."""


def find_cut(section: SelectSection, scores: NDArray[np.float64], rows: NDArray[np.int64]) -> Cut:
    """Return the cut of a rule.

    Args:
        scores: float64 [N], BLEU in [0, 100].
        rows: int64 [N], row of each pair.
    """
    if section.rule == "gap":
        edge = otsu_threshold(scores)
        return NOTHING if edge is None else Cut(edge)
    assert section.value is not None
    return Cut(section.value) if section.rule == "threshold" else lowest(scores, rows, section.value)


def lowest(scores: NDArray[np.float64], rows: NDArray[np.int64], share: float) -> Cut:
    """Return the cut that selects the floor(`share` x N) pairs of lowest (score, row)."""
    count = int(share * len(scores) + 1e-9)  # 0.29 * 100 is 28.999999999999996
    if count == 0:
        return NOTHING
    last = np.lexsort((rows, scores))[count - 1]
    return Cut(float(scores[last]), int(rows[last]))


def otsu_threshold(scores: NDArray[np.float64]) -> float | None:
    """Return the histogram edge that best separates two groups, or None for one group.

    Otsu 1979, "A threshold selection method from gray-level histograms": the edge with the largest variance between the two
    sides, w0 w1 (m0 - m1)^2. Of edges with equal variance (empty bins between them) the middle one.
    """
    # Equal texts score 100.00000000000004, which is outside the histogram.
    counts, edges = np.histogram(np.minimum(scores, HIGHEST), bins=HISTOGRAM_BINS, range=(0.0, HIGHEST))
    centers = (edges[:-1] + edges[1:]) / 2
    below, mass = np.cumsum(counts)[:-1], np.cumsum(counts * centers)[:-1]
    above = len(scores) - below
    both = (below > 0) & (above > 0)
    if not both.any():
        return None
    difference = mass[both] / below[both] - (np.sum(counts * centers) - mass[both]) / above[both]
    between = below[both] * above[both] * difference**2
    best = np.flatnonzero(both)[np.isclose(between, between.max(), rtol=1e-12, atol=0.0)]
    return float(edges[best[len(best) // 2] + 1])


Refusal = Literal["empty", "cut off", "looping", "fails the verifier"]
LOOP_CHARACTERS = 32
"""Minimum length of a loop; shorter repeats are ordinary text (`ha ha ha`, `1000000`)."""
LONGEST_PERIOD = 512


def refusal(
    response: str, finish_reason: str, *, loop_repeats: int, verifier_score: float | None, verifier_minimum: float
) -> Refusal | None:
    """Return the guard's reason to reject a response, or None.

    Args:
        finish_reason: "stop" or "length".
        loop_repeats: minimum repeats at the end of a loop.
        verifier_score: the verifier's score; None without a verifier.
        verifier_minimum: minimum score.
    """
    if not response.strip():
        return "empty"
    if is_looping(response, loop_repeats):
        return "looping"
    if finish_reason == "length":
        return "cut off"
    if verifier_score is not None and not verifier_score >= verifier_minimum:
        return "fails the verifier"
    return None


def is_looping(text: str, repeats: int) -> bool:
    """Return True for a text that ends in at least `repeats` copies of one piece.

    Together they have at least `LOOP_CHARACTERS`. The last copy may be partial, because a loop usually ends at the token limit.
    """
    text = text.rstrip()
    # Repeated sentences have a space between them, which the last one lacks.
    return any(_ends_in_copies(variant, repeats) for variant in (text, f"{text} "))


def _ends_in_copies(text: str, repeats: int) -> bool:
    for period in range(1, min(LONGEST_PERIOD, len(text) // repeats) + 1):
        length = max(period * repeats, LOOP_CHARACTERS)
        if length <= len(text) and text[-length:-period] == text[-length + period :]:
            return True
    return False


def agreement(candidates: Sequence[str], scorer: BleuScorer) -> list[float]:
    """Return the mean BLEU of each candidate to the others, in [0, 100]."""
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
    """Return the index of the highest score among allowed candidates, or None.

    Raises:
        ValueError: different numbers of scores and candidates.
    """
    ranked = [(-score, index) for index, (score, fine) in enumerate(zip(scores, allowed, strict=True)) if fine]
    return min(ranked)[1] if ranked else None


Action = Literal["keep", "replace", "mix", "drop"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One response that may replace an original.

    Attributes:
        score: by the method, higher is better.
        refusal: the guard's reason to reject it, or None.
    """

    text: str
    score: float
    refusal: str | None


@dataclass(frozen=True, slots=True)
class Decision:
    """Decision on a pair.

    Attributes:
        action: `keep` trains on the original, `replace` on the new response, `mix` on both, `drop` on neither.
        reason: in words, for the provenance.
        chosen: index of the best allowed candidate, or None.
        guarded: True where the guard rejected all candidates.
    """

    action: Action
    reason: str
    chosen: int | None = None
    guarded: bool = False


LEARNED = Decision("keep", "learned: its score is above the cut")


def needs_candidates(section: RelabelSection) -> bool:
    """Return True for a configuration that uses new responses."""
    return section.struggling in ("replace", "mix")


def decide(section: RelabelSection, original: str, candidates: Sequence[Candidate]) -> Decision:
    """Return the decision on a struggling pair.

    Args:
        candidates: of the prompt; unused for `keep` and `drop`.

    Raises:
        ValueError: candidates are needed and missing.
    """
    if not needs_candidates(section):
        action: Action = "drop" if section.struggling == "drop" else "keep"
        return Decision(action, f"struggling: relabel.struggling is {action}")
    if not candidates:
        raise ValueError("a struggling pair without candidates")
    chosen = best([candidate.score for candidate in candidates], [candidate.refusal is None for candidate in candidates])
    if chosen is None:
        reasons = ", ".join(dict.fromkeys(candidate.refusal or "" for candidate in candidates))
        return Decision(section.guarded, f"guarded: {reasons}", guarded=True)
    if candidates[chosen].text.strip() == original.strip():
        return Decision("keep", "struggling: the new response is the original", chosen)
    action = "mix" if section.struggling == "mix" else "replace"
    return Decision(action, f"struggling: {action} by {section.method}", chosen)
