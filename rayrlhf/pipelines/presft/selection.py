"""What becomes of a pair, and why: one pure rule from its score, its candidates and the configured choices.

Which pairs struggle: a cut through all scores, found once, then applied row by row in a second pass.

A cut orders pairs by (score, row), so that a share of the dataset is met exactly and ties fall the same way in every run.

What a model's response must not be before it may replace a person's: empty, cut off, looping, or refused by the verifier.

Which of n candidates a struggling prompt gets: the one with the highest score, the earliest among equals.

What the score is depends on the method. Minimum Bayes risk (Kumar and Byrne 2004; Eikema and Aziz 2020) takes the candidate
closest to all others, here by mean sentence BLEU with the other candidate as the reference; it needs neither model nor
verifier.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rayrlhf.batch_inference.scoring import BleuScorer
from rayrlhf.config.presft import RelabelSection, SelectSection

HISTOGRAM_BINS = 256
HIGHEST = 100.0


@dataclass(frozen=True, slots=True)
class Cut:
    """Pairs up to and including (`score`, `row`) are selected; `row` -1 leaves out all pairs of exactly that score."""

    score: float
    row: int = -1

    def selects(self, score: float, row: int) -> bool:
        """Whether a pair struggles."""
        return (score, row) <= (self.score, self.row)


NOTHING = Cut(0.0)
"""Selects no pair."""


def find_cut(section: SelectSection, scores: NDArray[np.float64], rows: NDArray[np.int64]) -> Cut:
    """Return the cut that a rule makes.

    Args:
        section: the rule and its value.
        scores: float64 [N], BLEU in [0, 100].
        rows: int64 [N], the id of each pair.
    """
    if section.rule == "gap":
        edge = otsu_threshold(scores)
        return NOTHING if edge is None else Cut(edge)
    assert section.value is not None
    return Cut(section.value) if section.rule == "threshold" else lowest(scores, rows, section.value)


def lowest(scores: NDArray[np.float64], rows: NDArray[np.int64], share: float) -> Cut:
    """Return the cut below which lie exactly floor(`share` x N) pairs, those of lowest (score, row)."""
    count = int(share * len(scores) + 1e-9)  # 0.29 * 100 is 28.999999999999996
    if count == 0:
        return NOTHING
    last = np.lexsort((rows, scores))[count - 1]
    return Cut(float(scores[last]), int(rows[last]))


def otsu_threshold(scores: NDArray[np.float64]) -> float | None:
    """Return the histogram edge that separates two groups best, or None where there are no two groups.

    Otsu 1979, "A threshold selection method from gray-level histograms": of all edges the one with the largest variance between
    the two sides, w0 w1 (m0 - m1)^2. Where several edges divide the pairs alike (an empty stretch), the middle one.
    """
    # Equal texts score 100.00000000000004, which a histogram would leave out.
    counts, edges = np.histogram(np.minimum(scores, HIGHEST), bins=HISTOGRAM_BINS, range=(0.0, HIGHEST))
    centres = (edges[:-1] + edges[1:]) / 2
    below, mass = np.cumsum(counts)[:-1], np.cumsum(counts * centres)[:-1]
    above = len(scores) - below
    both = (below > 0) & (above > 0)
    if not both.any():
        return None
    difference = mass[both] / below[both] - (np.sum(counts * centres) - mass[both]) / above[both]
    between = below[both] * above[both] * difference**2
    best = np.flatnonzero(both)[np.isclose(between, between.max(), rtol=1e-12, atol=0.0)]
    return float(edges[best[len(best) // 2] + 1])


Refusal = Literal["empty", "cut off", "looping", "fails the verifier"]
LOOP_CHARACTERS = 32
"""Shorter repeats are ordinary text (`ha ha ha`, `1000000`)."""
LONGEST_PERIOD = 512


def refusal(
    response: str, finish_reason: str, *, loop_repeats: int, verifier_score: float | None, verifier_minimum: float
) -> Refusal | None:
    """Return why a response is refused, or None.

    Args:
        response: the text.
        finish_reason: "stop" or "length".
        loop_repeats: repeats at the end that make a loop.
        verifier_score: the verifier's score; None where there is no verifier.
        verifier_minimum: least score that passes.
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
    """Whether the text ends in at least `repeats` copies of one piece that together have `LOOP_CHARACTERS` or more.

    The last copy may be cut anywhere, since a loop usually ends where the tokens ran out.
    """
    text = text.rstrip()
    # Sentences repeat with the space between them, which the last one lacks.
    return any(_ends_in_copies(variant, repeats) for variant in (text, f"{text} "))


def _ends_in_copies(text: str, repeats: int) -> bool:
    for period in range(1, min(LONGEST_PERIOD, len(text) // repeats) + 1):
        length = max(period * repeats, LOOP_CHARACTERS)
        if length <= len(text) and text[-length:-period] == text[-length + period :]:
            return True
    return False


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


Action = Literal["keep", "replace", "mix", "drop"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One response that may replace an original.

    Attributes:
        text: the response.
        score: what the method says of it, higher is better.
        refusal: why the guard refuses it; None when it does not.
    """

    text: str
    score: float
    refusal: str | None


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a pair.

    Attributes:
        action: `keep` trains on the original, `replace` on the new response, `mix` on both, `drop` on neither.
        reason: in words, for the provenance.
        chosen: index of the candidate that became (or would have become) the new response; None without one.
        guarded: whether the guard refused all candidates.
    """

    action: Action
    reason: str
    chosen: int | None = None
    guarded: bool = False


LEARNED = Decision("keep", "learned: its score is above the cut")


def needs_candidates(section: RelabelSection) -> bool:
    """Whether the configured choice reads new responses at all."""
    return section.struggling in ("replace", "mix")


def decide(section: RelabelSection, original: str, candidates: Sequence[Candidate]) -> Decision:
    """Return the decision on a struggling pair.

    Args:
        section: the choices.
        original: the dataset's response.
        candidates: of the prompt; not looked at when the choice is `keep` or `drop`.

    Raises:
        ValueError: the choice needs candidates and there are none.
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
