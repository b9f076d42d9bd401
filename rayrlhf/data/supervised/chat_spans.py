"""Assistant spans of a rendered conversation, in characters and tokens.

A chat template with {% generation %} marks defines them. With any other template the conversation is rendered up to and
including each assistant turn. If these texts are prefixes of the whole text, the characters of a turn are known exactly. If
not, the template rewrites earlier turns, and the row is rejected.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rayrlhf.data.messages import Message
from rayrlhf.data.records import Bool
from rayrlhf.data.templates import Options, render
from rayrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""First character, and the one after the last."""

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_generation_marks(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return True if the chat template marks the assistant's text."""
    return bool(_MARK.search(tokenizer.get_chat_template()))


def assistant_spans(
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Sequence[list[Message]],
    texts: Sequence[str],
    places: Sequence[str],
    options: Sequence[Options | None],
) -> list[list[Span]]:
    """Return the spans of the assistant's turns with loss, end-of-turn marks included.

    Args:
        tokenizer: has a chat template.
        conversations: messages of each conversation.
        texts: the rendered conversations.
        places: file and row of each, for error messages.
        options: arguments of the chat template for each.

    Raises:
        UserError: the template renders a turn differently once others follow, or an assistant's turn comes first.
    """
    if has_generation_marks(tokenizer):
        return _marked_spans(tokenizer, conversations, places, options)
    turns = [
        (index, number)
        for index, messages in enumerate(conversations)
        for number, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    for index, number in turns:
        if number == 0:
            raise UserError(f"{places[index]}: message 1 is from the assistant, expected the user's or a system message")
    where = [f"{places[index]}: message {number + 1}" for index, number in turns]
    own = [options[index] for index, _ in turns]
    opened = render(tokenizer, [conversations[index][:number] for index, number in turns], where, options=own)
    closed = render(tokenizer, [conversations[index][: number + 1] for index, number in turns], where, whole=True, options=own)
    spans: list[list[Span]] = [[] for _ in conversations]
    for (index, number), before, after in zip(turns, opened, closed, strict=True):
        if not (texts[index].startswith(after) and after.startswith(before) and len(after) > len(before)):
            raise UserError(
                f"{places[index]}: message {number + 1}: the chat template renders it differently once others follow, so its "
                "tokens are unknown; mark the assistant's turns in the template with {% generation %}, or set "
                "data.loss_on to all"
            )
        if conversations[index][number].get("train") is not False:
            spans[index].append((len(before), len(after)))
    return spans


def tokens_in_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> Bool:
    """Return True for tokens that overlap a span, bool [L].

    A token across a span's edge counts, as in the assistant mask of `apply_chat_template`.

    Args:
        offsets: first character, and the one after the last, of each token; increasing.
        spans: increasing, disjoint.
    """
    edges = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    inside = np.zeros(len(edges), dtype=np.bool_)
    for start, end in spans:
        inside |= (edges[:, 0] < end) & (edges[:, 1] > start)
    return inside


def crosses_a_start(offsets: Sequence[Span], spans: Sequence[Span]) -> bool:
    """Return True if a token begins before a span and ends in it.

    The text before the span has other tokens when tokenized alone.
    """
    edges = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    return any(bool(((edges[:, 0] < start) & (edges[:, 1] > start)).any()) for start, _ in spans)


def _marked_spans(
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Sequence[list[Message]],
    places: Sequence[str],
    options: Sequence[Options | None],
) -> list[list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    result = []
    for messages, place, option in zip(conversations, places, options, strict=True):
        _, [spans] = render_jinja_template(
            conversations=[messages],
            chat_template=tokenizer.get_chat_template(tools=option.get("tools") if option else None),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
            **(option or {}),
        )
        flags = [message.get("train") is not False for message in messages if message["role"] == "assistant"]
        if not all(flags) and len(flags) != len(spans):
            raise UserError(
                f"{place}: {len(spans)} marks of the chat template for {len(flags)} turns, of which some have no loss"
            )
        kept = flags if not all(flags) else [True] * len(spans)
        result.append([(start, end) for (start, end), keep in zip(spans, kept, strict=True) if keep])
    return result
