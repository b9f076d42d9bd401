"""What in-context learning shows a model: an example is a question with its answer, and knows where it came from.

Two examples are told apart by `identity` (file and row), never by position in a list, so that shuffled, filtered or
concatenated pools cannot make an example its own demonstration.
"""

import unicodedata
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """One question and its answer.

    Attributes:
        identity: where it came from, such as `train.jsonl:12`; equal for the same row and for no other.
        prompt: the question as text.
        answer: the answer as text.
    """

    identity: str
    prompt: str
    answer: str


def normalized(text: str) -> str:
    """Return text with compatible characters unified (NFKC), case folded and every run of white space made one blank."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
