"""Tokens of chat conversations in which completions keep their sampled tokens.

A chat client sends the whole conversation with every request. The first request is rendered by the chat template and encoded. A
later one that continues after a completion is not encoded again; only the text after the completion is (its end, the new
messages, the header of the next completion). Templates that rewrite earlier messages, for example to drop reasoning, allow no
continuation; such a request starts a new segment.
"""

from collections.abc import Sequence

import numpy as np

from rayrlhf.data.messages import Message
from rayrlhf.data.records import Int32
from rayrlhf.data.templates import render, require_chat_template
from rayrlhf.library_types import Tokenizer

_MARK = "\u2402answer\u2403"
"""Placeholder of a completion to find the template's end of one; no template contains it."""


class ChatTokens:
    """Encoder of conversations with one tokenizer's chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Find the text with which the template ends a completion.

        Raises:
            UserError: the tokenizer has no chat template, or the template refuses a question with an answer.
        """
        require_chat_template(tokenizer)
        self._tokenizer = tokenizer
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _MARK}]
        self._end = self._rendered(turns, whole=True).rpartition(_MARK)[2]

    def opening(self, messages: list[Message]) -> Int32:
        """Return the tokens of a conversation up to the next completion, int32 [P].

        Raises:
            UserError: the template refuses it.
        """
        return self._encoded(self._rendered(messages, whole=False))

    def between(self, messages: list[Message], answered: int, last_token: int) -> Int32 | None:
        """Return the tokens between a completion and the next one, int32 [N].

        Args:
            answered: number of messages up to and including the sampled completion.
            last_token: last token of the completion; if it is the template's end of a completion, it is not repeated.

        Returns:
            None if the template now renders the earlier messages differently.

        Raises:
            UserError: the template refuses the conversation.
        """
        before = self._rendered(messages[:answered], whole=True)
        now = self._rendered(messages, whole=False)
        if not (before.endswith(self._end) and now.startswith(before)):
            return None
        last = self._tokenizer.decode([last_token])
        end = self._end[len(last) :] if self._end.startswith(last) else self._end
        return self._encoded(end + now[len(before) :])

    def _rendered(self, messages: list[Message], *, whole: bool) -> str:
        return render(self._tokenizer, [messages], ["an agent's messages"], whole=whole)[0]

    def _encoded(self, text: str) -> Int32:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False), np.int32)


def continues(messages: Sequence[Message], earlier: Sequence[Message]) -> bool:
    """Return True if a conversation extends an earlier one by at least one message.

    Blanks around a message are ignored: clients strip completions before they send them back.
    """
    start = messages[: len(earlier)]
    return len(messages) > len(earlier) and all(
        new["role"] == old["role"] and new["content"].strip() == old["content"].strip()
        for new, old in zip(start, earlier, strict=True)
    )
