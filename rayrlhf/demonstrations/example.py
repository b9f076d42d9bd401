"""Examples of in-context learning, and the leaks between an example and a demonstration.

Two examples are distinguished by `identity` (file and row), never by their position in a list. So shuffled, filtered or
concatenated pools cannot make an example its own demonstration.

A dataset row is an example: `prompt` and `completion` (text; the columns of SFT, so the same file can be used for tuning). A
dataset of several tasks has a column such as `task`; demonstrations come from the example's own task. `builtin:mappings` is
such a dataset; its `answer` equals `completion`, for evaluations that read it. Its splits share no words and no tasks, so the
demonstrations of the evaluation split are the other rows of the task.

A context must not contain the example itself, its text, or a near-duplicate of its answer: a leak raises a k-curve for the
wrong reason, so texts are compared strictly. Answers repeat by nature ("yes", "positive"), and an equal label is the point of a
demonstration. So answers, and near-duplicates of texts, are compared only from `words` words on.
"""

from dataclasses import dataclass
from enum import StrEnum

from rayrlhf.data.words import normalized, words_of


@dataclass(frozen=True, slots=True)
class Example:
    """A question and its answer.

    Attributes:
        identity: source row, such as `train.jsonl:12`; unique per row.
        prompt: the question as text.
        answer: the answer as text.
        task: name of its task, which demonstrations share; "" where there is only one.
    """

    identity: str
    prompt: str
    answer: str
    task: str = ""


SHINGLE_WORDS = 3


class Leak(StrEnum):
    """Reason to exclude a candidate."""

    ITSELF = "itself"
    SAME_TEXT = "same_text"
    NEAR_TEXT = "near_text"
    NEAR_ANSWER = "near_answer"


@dataclass(frozen=True, slots=True)
class LeakRules:
    """Thresholds of the comparison.

    Attributes:
        resemblance: minimum resemblance of near-duplicates, in (0, 1].
        words: minimum length; resemblance of fewer words is not meaningful.
    """

    resemblance: float = 0.8
    words: int = 8


def resemblance(first: str, second: str) -> float:
    """Return the Jaccard index of two texts' sets of three-word shingles, in [0, 1].

    Broder 1997, "On the resemblance and containment of documents". A text of fewer than three words is one shingle; two texts
    without words have resemblance 1.
    """
    one, other = _shingles(first), _shingles(second)
    if not one and not other:
        return 1.0
    return len(one & other) / len(one | other)


def find_leak(target: Example, candidate: Example, rules: LeakRules) -> Leak | None:
    """Return the reason to exclude a candidate from a target's context, or None."""
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
