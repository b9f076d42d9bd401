"""Layout of demonstrations and a question within a token budget.

They become turns, a system block or plain text. If not all fit, the farthest demonstrations are dropped first, in any display
order, because the nearest help most. The number of dropped ones is returned. A question that does not fit even without
demonstrations is an error, because truncation would change it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from rayrlhf.data.messages import Message
from rayrlhf.demonstrations.choosing import Order, in_order
from rayrlhf.demonstrations.example import Example
from rayrlhf.errors import UserError

Layout = Literal["turns", "system"]
Context = TypeVar("Context")


@dataclass(frozen=True, slots=True)
class TextForm:
    """Plain-text format of an example.

    Attributes:
        question: contains `{prompt}`; the model's answer follows it.
        separator: follows each demonstration's answer.
    """

    question: str = "{prompt}\n"
    separator: str = "\n\n"

    def __post_init__(self) -> None:
        """Check the question.

        Raises:
            UserError: `{prompt}` is missing.
        """
        if "{prompt}" not in self.question:
            raise UserError(f"question {self.question!r}: expected {{prompt}} in it")

    def ask(self, prompt: str) -> str:
        """Return the formatted question."""
        return self.question.replace("{prompt}", prompt)


def as_messages(
    demonstrations: Sequence[Example], prompt: str, layout: Layout, form: TextForm, system_prompt: str | None = None
) -> list[Message]:
    """Return a conversation that ends with the question.

    Args:
        demonstrations: in display order.
        layout: `turns` gives each demonstration a user and an assistant turn, `system` puts all into the system turn.
        form: format of an example in the system turn.
        system_prompt: beginning of the system turn, if any.
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
    """Return plain text that ends with the question, for models without a chat template.

    `opening` is its beginning, if any.
    """
    shown = [form.ask(shown.prompt) + shown.answer for shown in demonstrations]
    return form.separator.join([*([opening] if opening is not None else []), *shown, form.ask(prompt)])


@dataclass(frozen=True, slots=True)
class Fitted(Generic[Context]):
    """A context within its budget.

    Attributes:
        context: returned by `assemble` for the demonstrations that fit.
        demonstrations: those, in display order.
        dropped: number of demonstrations that did not fit.
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
        order: display order.
        assemble: builds the context from demonstrations in display order.
        count: returns the tokens of a context.
        budget: maximum tokens.
        where: file and row of the question, for error messages.

    Raises:
        UserError: the question alone exceeds the budget.
    """
    for kept in range(len(nearest_first), -1, -1):
        shown = in_order(nearest_first[:kept], order)
        context = assemble(shown)
        tokens = count(context)
        if tokens <= budget:
            return Fitted(context, shown, len(nearest_first) - kept, tokens)
    raise UserError(f"{where}: the question has {tokens} tokens without any demonstration, expected at most {budget}")
