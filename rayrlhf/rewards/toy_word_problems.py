"""Rewards of the built-in word problems.

`worked_answer`, of the quickstart, pays for the right calculation, its result, and an end right after it. It needs no format
that an untuned model does not have. `word_problems` pays for a short, worked, correct response that ends in `Answer: N`:

| part    | weight | full if                                                                                |
|---------|--------|----------------------------------------------------------------------------------------|
| correct | 0.50   | the final number is right; half if the right one comes first and others follow         |
| format  | 0.20   | the response ends in exactly `Answer: N`; half if more text follows                    |
| stop    | 0.15   | the model ended the response                                                           |
| concise | 0.15   | the problem's own numbers are used, in at most 80 characters; falls to 0 at 160        |

Each part is something a user wants. A model that cannot add yet can learn the form first, and a correct response is worth 0.5
more than a wrong one of the same form. Form alone does not pay: format and stop count only for a response that is correct or
uses the numbers of its own problem. A policy that collapses to a constant `Answer: 7` is rewarded only where the answer is 7.
"""

import re
from dataclasses import dataclass
from decimal import Decimal

from rayrlhf.rewards.gsm8k import final_number, numbers_in, reference_number

CORRECT_WEIGHT, FORMAT_WEIGHT, STOP_WEIGHT, CONCISE_WEIGHT = 0.5, 0.2, 0.15, 0.15
CONCISE_CHARACTERS = 80

_ENDS_IN_ANSWER = re.compile(r"(?:\A|(?<=\s))Answer: (-?[0-9]+)\Z")
_HAS_ANSWER = re.compile(r"(?:\A|(?<=\s))Answer: -?[0-9]+\b")


@dataclass(frozen=True, slots=True)
class Grade:
    """Parts of one response's reward, each in [0, 1]."""

    correct: float
    format: float
    stop: float
    concise: float

    @property
    def score(self) -> float:
        """Weighted sum, in [0, 1]."""
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
        answer: [B], the correct number, or a worked solution that ends in `#### N`.
        finish_reasons: [B], "stop" or "length".
        question: [B], the problems without the instructions around them.

    Raises:
        UserError: a reference answer has no number.
    """
    rows = zip(question or prompts, responses, answer, finish_reasons, strict=True)
    return [
        grade(problem, response, reference_number(index, expected), stopped=reason == "stop").score
        for index, (problem, response, expected, reason) in enumerate(rows)
    ]


def word_problems_exact(responses: list[str], answer: list[str | int | float]) -> list[float]:
    """Return 1 for each response that ends in exactly the right `Answer: N`, else 0.

    With weight 0 it is only reported.

    Raises:
        UserError: a reference answer has no number.
    """
    return [float(is_exact(response, expected)) for response, expected in zip(responses, answer, strict=True)]


BASE_WEIGHT, ENDED_WEIGHT, SHORT_WEIGHT = 0.4, 0.3, 0.3
WRONG_SHARE = 0.3
SHORT_CHARACTERS = 40
_EQUATION = re.compile(r"(-?[0-9]+(?: ?[-+*x\u00d7] ?[0-9]+)+)(?= ?=)")


def worked_answer(
    responses: list[str], answer: list[str | int | float], solution: list[str], finish_reasons: list[str]
) -> list[float]:
    """Return each response's reward in [0, 1] for calculation, result, and end.

    Only a response with the right final number, or with the calculation of `solution` on the left of an equals sign, is paid:
    0.4, 0.3 more if the model ended it, and 0.3 more for at most 40 characters, falling to 0 at 120. With a wrong final number
    it gets 0.3 of that.

    Args:
        responses: [B].
        answer: [B], the correct number.
        solution: [B], begins with the calculation, up to an equals sign, such as `3 + 4 = 7`.
        finish_reasons: [B], "stop" or "length".

    Raises:
        UserError: a reference answer has no number.
    """
    rows = enumerate(zip(responses, answer, solution, finish_reasons, strict=True))
    return [_worked(text, reference_number(i, right), work, ended=end == "stop") for i, (text, right, work, end) in rows]


def worked_answer_exact(responses: list[str], answer: list[str | int | float], finish_reasons: list[str]) -> list[float]:
    """Return 1 for each response with the right final number and an end, else 0.

    With weight 0 it is only reported.

    Raises:
        UserError: a reference answer has no number.
    """
    rows = zip(responses, answer, finish_reasons, strict=True)
    return [float(end == "stop" and is_correct(text, right)) for text, right, end in rows]


def _worked(response: str, expected: Decimal, solution: str, *, ended: bool) -> float:
    right = final_number(response) == expected
    if not right and _terms(solution) not in (_terms(found) for found in _EQUATION.findall(response)):
        return 0.0
    short = min(1.0, max(0.0, 1.5 - len(response.strip()) / (2 * SHORT_CHARACTERS)))
    return (BASE_WEIGHT + ENDED_WEIGHT * ended + SHORT_WEIGHT * short) * (1.0 if right else WRONG_SHARE)


def _terms(text: str) -> list[str]:
    """Return numbers and operators of a calculation; sums and products are sorted."""
    parts = re.findall(r"[0-9]+|[-+*]", re.sub("[x\u00d7]", "*", text.partition("=")[0]))
    return parts if "-" in parts else sorted(parts)


def grade(problem: str, response: str, expected: Decimal, *, stopped: bool) -> Grade:
    """Grade one response to one problem.

    Args:
        stopped: True if the model ended the response itself.
    """
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
    """Return True if the final number is right, in any form."""
    return final_number(response) == reference_number(0, answer)


def is_exact(response: str, answer: str | int | float) -> bool:
    """Return True if the response ends in exactly `Answer: N` with the right N."""
    match = _ENDS_IN_ANSWER.search(response.strip())
    return match is not None and Decimal(match[1]) == reference_number(0, answer)


def _correctness(problem: str, response: str, expected: Decimal) -> float:
    """Grade the number.

    Without the word "answer" the first number that is not in the problem counts half.
    """
    if final_number(response) == expected:
        return 1.0
    in_problem = set(numbers_in(problem))
    reached = next((number for number in numbers_in(response) if number not in in_problem), None)
    return 0.5 if reached == expected and "answer" not in response.lower() else 0.0


def _form(response: str) -> float:
    if _ENDS_IN_ANSWER.search(response):
        return 1.0
    return 0.5 if _HAS_ANSWER.search(response) else 0.0


def _brevity(response: str) -> float:
    return min(1.0, max(0.0, 2.0 - len(response) / CONCISE_CHARACTERS))


def _uses_numbers_of(problem: str, response: str) -> bool:
    """Return True if the working uses two (or all) of the problem's numbers."""
    head, marker, tail = response.rpartition("Answer:")
    working = head if marker else tail
    numbers = set(numbers_in(problem))
    return len(numbers & set(numbers_in(working))) >= min(2, len(numbers)) and bool(working)
