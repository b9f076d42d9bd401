"""What must never stand in an example's context: itself, its own text, or what is as good as its answer.

A leak makes a k-curve rise for the wrong reason, so the rules err on the strict side for texts. For answers they cannot: labels
repeat by nature ("yes", "positive"), and an equal label is what a demonstration is for. So answers, and texts that are nearly
but not quite equal, are compared only from `words` words on.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from rayrlhf.demonstrations.example import Example, normalized

SHINGLE_WORDS = 3


class Leak(StrEnum):
    """Why a candidate may not be shown."""

    ITSELF = "itself"
    SAME_TEXT = "same_text"
    NEAR_TEXT = "near_text"
    NEAR_ANSWER = "near_answer"


@dataclass(frozen=True, slots=True)
class LeakRules:
    """How strict the comparison is.

    Attributes:
        resemblance: from this resemblance on two texts are near-duplicates, in (0, 1].
        words: shorter texts and answers are not compared by resemblance, since a few words say too little.
    """

    resemblance: float = 0.8
    words: int = 8


def words_of(text: str) -> list[str]:
    """Return the words of a text, aggregated, without punctuation."""
    return re.findall(r"\w+", normalized(text))


def resemblance(first: str, second: str) -> float:
    """Return the Jaccard index of the texts' sets of three-word shingles, in [0, 1] (Broder 1997, "On the resemblance ...").

    A text of fewer than three words is one shingle; two texts without words resemble each other fully.
    """
    one, other = _shingles(first), _shingles(second)
    if not one and not other:
        return 1.0
    return len(one & other) / len(one | other)


def find_leak(target: Example, candidate: Example, rules: LeakRules) -> Leak | None:
    """Return why the candidate may not be a demonstration of the target, None where it may."""
    if candidate.identity == target.identity:
        return Leak.ITSELF
    if normalized(candidate.prompt) == normalized(target.prompt):
        return Leak.SAME_TEXT
    if _near(target.prompt, candidate.prompt, rules):
        return Leak.NEAR_TEXT
    if _near(target.answer, candidate.answer, rules):
        return Leak.NEAR_ANSWER
    return None


def _near(first: str, second: str, rules: LeakRules) -> bool:
    shorter = min(len(words_of(first)), len(words_of(second)))
    return shorter >= rules.words and resemblance(first, second) >= rules.resemblance


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = words_of(text)
    if not words:
        return set()
    return {tuple(words[start : start + SHINGLE_WORDS]) for start in range(max(1, len(words) - SHINGLE_WORDS + 1))}
