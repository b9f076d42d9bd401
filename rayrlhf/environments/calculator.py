"""`calculator`: a tool that evaluates expressions; a turn without one is the final answer."""

import ast
import operator
from collections.abc import Callable

from rayrlhf.data.records import Prompt
from rayrlhf.environments.protocol import Action, Answer
from rayrlhf.errors import UserError

MAX_CHARACTERS, MAX_NUMBER = 100, 10**12
"""Limits of an expression's length and of intermediate results, so that no turn keeps the machine busy."""

_OPERATIONS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class Calculator:
    """Responds to `[37+58]` with ` 95 ` and rewards the correct final answer.

    Args:
        answer: column with the correct answer, compared as text without surrounding blanks.
        right: reward of the correct answer; a wrong one earns 0.
        call: reward of a valid calculation; keep it small, it only helps to discover the tool. An invalid one earns 0.
        start: text that opens a call.
        end: text that closes it; add it to `rollout.stop`, so that the policy waits for the result.
    """

    def __init__(self, answer: str = "answer", right: float = 1.0, call: float = 0.0, start: str = "[", end: str = "]") -> None:
        self._column, self._right, self._call = answer, right, call
        self._start, self._end = start, end
        self._answer = ""

    async def reset(self, prompt: Prompt, seed: int) -> str:
        """Look up the answer; returns no text.

        Raises:
            UserError: the dataset has no such column.
        """
        if self._column not in prompt.columns:
            columns = ", ".join(sorted(prompt.columns)) or "none"
            raise UserError(f"environment calculator: the dataset has no column {self._column!r}; its columns are: {columns}")
        self._answer = str(prompt.columns[self._column]).strip()
        return ""

    async def step(self, action: Action) -> Answer:
        """Calculate, or grade the final answer."""
        _, opened, rest = action.text.rpartition(self._start)
        expression, closed, _ = rest.partition(self._end)
        if not (opened and closed):
            return Answer(reward=self._right if action.text.strip() == self._answer else 0.0, done=True)
        try:
            return Answer(f" {calculate(expression)} ", self._call)
        except ValueError:
            return Answer(" error ")


def calculate(expression: str) -> str:
    """Return the value of an expression of numbers, + - * / and parentheses.

    Whole numbers have no fraction.

    Raises:
        ValueError: anything else, a division by zero, or numbers beyond `MAX_NUMBER`.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ValueError("too long")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError(str(error)) from error
    return str(int(value)) if value == int(value) else f"{value:.6g}"


def _value(node: ast.expr) -> float:
    value: float
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        value = _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = -_value(node.operand)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        value = node.value
    else:
        raise ValueError("not a calculation")
    if not abs(value) <= MAX_NUMBER:
        raise ValueError("too large")
    return value
