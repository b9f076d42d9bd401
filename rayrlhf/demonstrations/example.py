"""What in-context learning shows a model: an example is a question with its answer, and knows where it came from.

Two examples are told apart by `identity` (file and row), never by position in a list, so that shuffled, filtered or
concatenated pools cannot make an example its own demonstration.

In a dataset a row is an example: `prompt` and `completion` (text; the columns of SFT, so the same file can be tuned on), and
where a dataset holds several tasks a column such as `task`, whose value is equal for rows of one task. An example is shown only
beside examples of its own task. `builtin:mappings` is such a dataset; `answer` in it equals `completion`, for evaluations that
read it. Its splits keep words and tasks apart, so within the evaluation split the other rows of a task are its demonstrations.
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
        task: which task it is of; examples of one task alone are shown beside each other. "" where there is only one.
    """

    identity: str
    prompt: str
    answer: str
    task: str = ""


def normalized(text: str) -> str:
    """Return text with compatible characters unified (NFKC), case folded and every run of white space made one blank."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
