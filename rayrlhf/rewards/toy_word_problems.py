"""The reward of the quickstart: a short, worked, right answer that ends in `Answer: N` and then stops.

| part    | weight | full when                                                                              |
|---------|--------|----------------------------------------------------------------------------------------|
| correct | 0.50   | the final number is right; half when the right one is reached first, then talked over  |
| format  | 0.20   | the response ends in exactly `Answer: N`; half when more text follows                  |
| stop    | 0.15   | the model stopped by itself                                                            |
| concise | 0.15   | the problem's own numbers are used, in at most 80 characters; falls to 0 at 160        |

Each part is something a user wants, so that a model which cannot add yet has form to learn from, and a right response is worth
more than a wrong one of the same form by half of all there is. Form alone is no way out: format and stop count only for a
response that is right or uses the numbers of its own problem, so a policy that collapses to a constant `Answer: 7` gets nothing
except where the answer is 7.
"""

import re
from dataclasses import dataclass
from decimal import Decimal

from rayrlhf.rewards.gsm8k import reference_number
from rayrlhf.rewards.numbers import final_number, numbers_in

CORRECT_WEIGHT, FORMAT_WEIGHT, STOP_WEIGHT, CONCISE_WEIGHT = 0.5, 0.2, 0.15, 0.15
CONCISE_CHARACTERS = 80

_ENDS_IN_ANSWER = re.compile(r"(?:\A|(?<=\s))Answer: (-?[0-9]+)\Z")
_HAS_ANSWER = re.compile(r"(?:\A|(?<=\s))Answer: -?[0-9]+\b")


@dataclass(frozen=True, slots=True)
class Grade:
    """The parts of one response's reward, each in [0, 1]."""

    correct: float
    format: float
    stop: float
    concise: float

    @property
    def score(self) -> float:
        """The weighted sum, in [0, 1]."""
        return (
            CORRECT_WEIGHT * self.correct
            + FORMAT_WEIGHT * self.format
            + STOP_WEIGHT * self.stop
            + CONCISE_WEIGHT * self.concise
        )


def word_problems(
    prompts: list[str],
    responses: list[str],
    answer: list[str | int | float],
    finish_reasons: list[str],
    question: list[str] | None = None,
) -> list[float]:
    """Return each response's graded reward in [0, 1].

    Args:
        prompts: [B], the problems; used where there is no `question` column.
        responses: [B].
        answer: [B], the right number, or a worked solution that ends in `#### N`.
        finish_reasons: [B], "stop" or "length".
        question: [B], the bare problems, without the instructions around them.

    Raises:
        UserError: a reference answer has no number in it.
    """
    rows = zip(question or prompts, responses, answer, finish_reasons, strict=True)
    return [
        grade(problem, response, reference_number(index, expected), stopped=reason == "stop").score
        for index, (problem, response, expected, reason) in enumerate(rows)
    ]


def word_problems_exact(responses: list[str], answer: list[str | int | float]) -> list[float]:
    """Return 1 for each response that ends in exactly the right `Answer: N`, else 0; give it weight 0 to report it only.

    Raises:
        UserError: a reference answer has no number in it.
    """
    return [float(is_exact(response, expected)) for response, expected in zip(responses, answer, strict=True)]


def grade(problem: str, response: str, expected: Decimal, *, stopped: bool) -> Grade:
    """Grade one response to one problem; `stopped` says that the model ended it by itself."""
    response = response.strip()
    correct = _correctness(problem, response, expected)
    uses_problem = _uses_numbers_of(problem, response)
    engaged = correct > 0 or uses_problem
    return Grade(
        correct=correct,
        format=_form(response) * engaged,
        stop=float(stopped and engaged),
        concise=_brevity(response) * uses_problem,
    )


def is_correct(response: str, answer: str | int | float) -> bool:
    """Whether the final number is right, in whatever form."""
    return final_number(response) == reference_number(0, answer)


def is_exact(response: str, answer: str | int | float) -> bool:
    """Whether the response ends in exactly `Answer: N` with the right N."""
    match = _ENDS_IN_ANSWER.search(response.strip())
    return match is not None and Decimal(match[1]) == reference_number(0, answer)


def _correctness(problem: str, response: str, expected: Decimal) -> float:
    """Grade the number. Who never says which one is the answer is taken at the first that the problem did not give."""
    if final_number(response) == expected:
        return 1.0
    given = set(numbers_in(problem))
    reached = next((number for number in numbers_in(response) if number not in given), None)
    return 0.5 if reached == expected and "answer" not in response.lower() else 0.0


def _form(response: str) -> float:
    if _ENDS_IN_ANSWER.search(response):
        return 1.0
    return 0.5 if _HAS_ANSWER.search(response) else 0.0


def _brevity(response: str) -> float:
    return min(1.0, max(0.0, 2.0 - len(response) / CONCISE_CHARACTERS))


def _uses_numbers_of(problem: str, response: str) -> bool:
    """Whether the text before the answer has two of the problem's numbers (all, where it has fewer)."""
    head, marker, tail = response.rpartition("Answer:")
    working = head if marker else tail
    given = set(numbers_in(problem))
    return len(given & set(numbers_in(working))) >= min(2, len(given)) and bool(working)
