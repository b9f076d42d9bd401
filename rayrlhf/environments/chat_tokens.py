"""Conversations as tokens, where the answers among the messages keep the tokens that were sampled.

A chat client sends the whole conversation with every request. The first one is rendered by the chat template and encoded. A
later one that goes on from an answer is not encoded again: only what the template puts behind the answer is (its end, the new
messages, the head of the next answer). Templates that rewrite what stands before, as those that drop earlier reasoning, leave
nothing to go on from, and the request begins anew.
"""

from collections.abc import Sequence

import numpy as np

from rayrlhf.config.library_types import Tokenizer
from rayrlhf.data.records import Int32
from rayrlhf.data.templates import Message, render, require_chat_template

_MARK = "\u2402answer\u2403"
"""Stands for an answer where the template's end of one is looked up; a text that no template has."""


class ChatTokens:
    """The messages of conversations, through one tokenizer's template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Look up how the template ends an answer.

        Raises:
            UserError: the tokenizer has no chat template, or it refuses a question with an answer.
        """
        require_chat_template(tokenizer)
        self._tokenizer = tokenizer
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _MARK}]
        self._end = self._rendered(turns, whole=True).rpartition(_MARK)[2]

    def opening(self, messages: list[Message]) -> Int32:
        """Return the tokens of a conversation, opened for an answer, int32 [P].

        Raises:
            UserError: the template refuses it.
        """
        return self._encoded(self._rendered(messages, whole=False))

    def between(self, messages: list[Message], answered: int, last_token: int) -> Int32 | None:
        """Return the tokens between an answer and the next, int32 [N].

        Args:
            messages: of the conversation as it is now.
            answered: how many of them stand before and at the answer that was sampled.
            last_token: its last one; where it is what the template ends answers with, it is not said twice.

        Returns:
            None where the template writes what stands before in another way than it did.

        Raises:
            UserError: the template refuses the conversation.
        """
        before = self._rendered(messages[:answered], whole=True)
        now = self._rendered(messages, whole=False)
        if not (before.endswith(self._end) and now.startswith(before)):
            return None
        said = self._tokenizer.decode([last_token])
        end = self._end[len(said) :] if self._end.startswith(said) else self._end
        return self._encoded(end + now[len(before) :])

    def _rendered(self, messages: list[Message], *, whole: bool) -> str:
        return render(self._tokenizer, [messages], ["an agent's messages"], whole=whole)[0]

    def _encoded(self, text: str) -> Int32:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False), np.int32)


def goes_on(messages: Sequence[Message], earlier: Sequence[Message]) -> bool:
    """Return whether a conversation is an earlier one, its last answer included, with something new behind it.

    Blanks around a message do not count: clients strip answers before they send them back.
    """
    begins = messages[: len(earlier)]
    return len(messages) > len(earlier) and all(
        new["role"] == old["role"] and new["content"].strip() == old["content"].strip()
        for new, old in zip(begins, earlier, strict=True)
    )
