"""A target and its demonstrations as one row for SFT: how many, which of them fit, and in which columns; pure.

Columns say what is learnt, since SFT reads it off them: a `prompt` with its `completion` teaches the target's answer alone,
`messages` teach every answer.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayrlhf.config.icl_build import SampleSection
from rayrlhf.data.templates import Message, render
from rayrlhf.demonstrations.choosing import Order
from rayrlhf.demonstrations.context import Fitted, TextForm, as_messages, as_text, fit
from rayrlhf.demonstrations.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


def drawn(identity: str, least: int, most: int, seed: int) -> int:
    """Return how many demonstrations a target gets: evenly from `least` to `most`, a function of seed and identity alone."""
    digest = hashlib.sha256(f"{seed}\0demonstrations\0{identity}".encode()).digest()
    return random.Random(digest).randint(least, most)


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes samples.

    Attributes:
        section: layout, budget, and what is learnt.
        order: of the demonstrations on show.
        system_prompt: first words of a conversation, if any.
        tokenizer: counts tokens.
    """

    section: SampleSection
    order: Order
    system_prompt: str | None
    tokenizer: "PreTrainedTokenizerBase"

    def write(self, target: Example, nearest_first: Sequence[Example]) -> Fitted[Row] | None:
        """Return the row with as many of the nearest demonstrations as fit; None where the target alone is over the budget.

        Raises:
            UserError: the chat template refuses it.
        """
        if self._tokens(self._row(target, []), target.identity) > self.section.max_tokens:
            return None
        return fit(
            nearest_first,
            self.order,
            lambda shown: self._row(target, shown),
            lambda row: self._tokens(row, target.identity),
            self.section.max_tokens,
            target.identity,
        )

    def _row(self, target: Example, shown: Sequence[Example]) -> Row:
        form = TextForm(self.section.question, self.section.separator)
        if self.section.layout == "text":
            return {"prompt": as_text(shown, target.prompt, form), "completion": target.answer}
        messages = as_messages(shown, target.prompt, self.section.layout, form, self.system_prompt)
        answer: list[Message] = [{"role": "assistant", "content": target.answer}]
        if self.section.loss_on == "every":
            return {"messages": [*messages, *answer]}
        return {"prompt": messages, "completion": answer}

    def _tokens(self, row: Row, place: str) -> int:
        """Count as SFT will: the whole sample, its end included."""
        if self.section.layout == "text":
            text, plain = f"{row['prompt']}{row['completion']}{self.tokenizer.eos_token}", True
        else:
            whole = row.get("messages") or [*row["prompt"], *row["completion"]]
            [text], plain = render(self.tokenizer, [whole], [place], whole=True), False
        return len(self.tokenizer(text, add_special_tokens=plain)["input_ids"])
