"""Demonstrations and a question as what the model reads: turns, one system block, or plain text; within a budget of tokens.

Where not all fit, the farthest go first, whatever the order on show: the nearest is worth most. How many went is returned, for
whoever counts. A question that does not fit even alone is an error, because cutting it would ask something else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from rayrlhf.data.templates import Message
from rayrlhf.demonstrations.choosing import Order, in_order
from rayrlhf.demonstrations.example import Example
from rayrlhf.errors import UserError

Layout = Literal["turns", "system"]
Context = TypeVar("Context")


@dataclass(frozen=True, slots=True)
class TextForm:
    """How plain text shows an example.

    Attributes:
        question: with `{prompt}`; it ends where the model's answer begins.
        separator: stands after each demonstration's answer.
    """

    question: str = "{prompt}\n"
    separator: str = "\n\n"

    def __post_init__(self) -> None:
        """Check the question.

        Raises:
            UserError: it has no place for the prompt.
        """
        if "{prompt}" not in self.question:
            raise UserError(f"question {self.question!r}: expected a place for the prompt, {{prompt}}")

    def ask(self, prompt: str) -> str:
        """Return the prompt as a question that waits for its answer."""
        return self.question.replace("{prompt}", prompt)


def as_messages(
    demonstrations: Sequence[Example], prompt: str, layout: Layout, form: TextForm, system_prompt: str | None = None
) -> list[Message]:
    """Return a conversation that waits for the answer.

    Args:
        demonstrations: in the order on show.
        prompt: the question.
        layout: `turns` shows each demonstration as a user and an assistant turn, `system` all of them in the system turn.
        form: how the system block writes an example.
        system_prompt: the first words of the system turn, if any.
    """
    opening = [system_prompt] if system_prompt is not None else []
    turns: list[Message] = []
    if layout == "system" and demonstrations:
        opening.append(form.separator.join(form.ask(shown.prompt) + shown.answer for shown in demonstrations))
    elif layout == "turns":
        for shown in demonstrations:
            turns += [{"role": "user", "content": shown.prompt}, {"role": "assistant", "content": shown.answer}]
    system = [{"role": "system", "content": "\n\n".join(opening)}] if opening else []
    return [*system, *turns, {"role": "user", "content": prompt}]


def as_text(demonstrations: Sequence[Example], prompt: str, form: TextForm, opening: str | None = None) -> str:
    """Return plain text that waits for the answer, for models without a chat template; `opening` are its first words."""
    shown = [form.ask(shown.prompt) + shown.answer for shown in demonstrations]
    return form.separator.join([*([opening] if opening is not None else []), *shown, form.ask(prompt)])


@dataclass(frozen=True, slots=True)
class Fitted(Generic[Context]):
    """A context within its budget.

    Attributes:
        context: what `assemble` made of the demonstrations that stayed.
        demonstrations: those, in the order on show.
        dropped: number of those that did not fit.
        tokens: length of the context.
    """

    context: Context
    demonstrations: list[Example]
    dropped: int
    tokens: int


def fit(
    nearest_first: Sequence[Example],
    order: Order,
    assemble: Callable[[Sequence[Example]], Context],
    count: Callable[[Context], int],
    budget: int,
    where: str,
) -> Fitted[Context]:
    """Return the context with as many of the nearest demonstrations as fit.

    Args:
        nearest_first: the demonstrations as chosen.
        order: of those that stay, as shown.
        assemble: makes the context of demonstrations in the order on show.
        count: tokens of a context.
        budget: largest number of tokens.
        where: file and row of the question, for messages of errors.

    Raises:
        UserError: the question alone is over the budget.
    """
    for kept in range(len(nearest_first), -1, -1):
        shown = in_order(nearest_first[:kept], order)
        context = assemble(shown)
        tokens = count(context)
        if tokens <= budget:
            return Fitted(context, shown, len(nearest_first) - kept, tokens)
    raise UserError(f"{where}: the question has {tokens} tokens without any demonstration, expected at most {budget}")
