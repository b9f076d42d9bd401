"""A dense reward for GSM8K's notation `<<48/2=24>>`: right calculations about the problem at hand.

The right final number is rare in a small model's answers; right steps on the way are not. A calculation counts if its result is
right, it works on a number of the question or an earlier result (the rest may be everyday numbers, such as 2, 12 or 60), and it
was not written before. Empty talk, made-up sums and a sum repeated earn nothing; wrong sums, and more sums than the reference
solution has, dilute what the right ones earn.
"""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from rayrlhf.rewards.gsm8k import numbers_in

_CALCULATION = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_EVERYDAY = frozenset(map(Fraction, [*range(1, 13), 24, 30, 52, 60, 100, 365, 1000]))
"""Numbers that a question need not name: half, a dozen, hours, percent."""
_LONGEST = 60
"""Longest expression that is read: nobody's worked solution needs more, and parsing stays cheap."""


def calculations(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    """Score each response by its calculations, in [0, 1]: the right ones over those written, or the reference's if it has more.

    Args:
        prompts: [B], the questions.
        responses: [B].
        answer: [B], the dataset's worked solutions.
    """
    return [_score(*texts) for texts in zip(prompts, responses, answer, strict=True)]


def _score(prompt: str, response: str, answer: str) -> float:
    question = {Fraction(number) for number in numbers_in(prompt)}
    known = question | {number / 100 for number in question}
    written = _CALCULATION.findall(response)
    expected = len(_CALCULATION.findall(answer))
    right: set[str] = set()
    for expression, result in written:
        calculation = _parse(expression)
        if calculation is None:
            continue
        value, numbers = calculation
        grounded = bool(numbers & known) and numbers <= known | _EVERYDAY
        if grounded and value == _number(result) and expression not in right:
            right.add(expression)
            known.add(value)
    return len(right) / max(len(written), expected, 1)


def _parse(expression: str) -> tuple[Fraction, set[Fraction]] | None:
    """The exact value of a sum with at least one operation, and the numbers in it; None if it is none."""
    if len(expression) > _LONGEST:
        return None
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        numbers: set[Fraction] = set()
        return (_value(tree, numbers), numbers) if isinstance(tree, ast.BinOp) else None
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _value(node: ast.expr, numbers: set[Fraction]) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left, numbers), _value(node.right, numbers))
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        numbers.add(number := Fraction(str(node.value)))
        return number
    raise ValueError("not a sum of numbers")


def _number(text: str) -> Fraction | None:
    found = numbers_in(text)
    return Fraction(found[0]) if len(found) == 1 else None
