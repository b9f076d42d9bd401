"""Conversations: validation of messages and rendering through the chat template.

A prompt is text or a list of {role, content} messages. Text becomes one user turn, unless the chat template is switched off.
The rendered text is final: it is encoded without adding special tokens, because the template writes them.
"""

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rayrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
ROLES = ("system", "user", "assistant", "tool")


def check_messages(value: Sequence[Any], where: str) -> list[Message]:
    """Validate a conversation that ends with a user or tool turn; see `check_turns`.

    Raises:
        UserError: as `check_turns`, or the last message is not a user or tool turn.
    """
    messages = check_turns(value, where)
    if messages[-1]["role"] not in ("user", "tool"):
        raise UserError(
            f"{where}: the last message is from the {messages[-1]['role']}, expected the user's, for the model to answer"
        )
    return messages


def check_turns(value: Sequence[Any], where: str) -> list[Message]:
    """Validate each message, with any role first and last.

    Args:
        value: the row's value.
        where: file, row and field, for error messages.

    Raises:
        UserError: not a list of {role, content} with text in both, or an unknown role.
    """
    if not value:
        raise UserError(f"{where}: the conversation is empty, expected at least one message")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f"{where}: message {number}: expected {{role, content}}, found {_short(message)}")
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"{where}: message {number}: expected text in role and content, found {_short(message)}")
        if role not in ROLES:
            near = difflib.get_close_matches(role, ROLES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(ROLES)}"
            raise UserError(f"{where}: message {number}: unknown role {role!r}; {hint}")
        messages.append({"role": role, "content": content})
    return messages


def conversation(prompt: str | list[Message], system_prompt: str | None) -> list[Message]:
    """Return a prompt as messages, with the system prompt unless it has its own.

    Text becomes one user turn.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def last_user_text(prompt: str | list[Message]) -> str:
    """Return a text prompt itself, or the last user turn's content ("" without one)."""
    if isinstance(prompt, str):
        return prompt
    return next((message["content"] for message in reversed(prompt) if message["role"] == "user"), "")


def require_chat_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Check that the tokenizer can render conversations.

    Raises:
        UserError: it has no chat template.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template; "
            "set model.chat_template to a Jinja file, or data.chat to false for plain text prompts"
        )


def render(
    tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[list[Message]], places: Sequence[str], *, whole: bool = False
) -> list[str]:
    """Render conversations through the chat template, each with a generation prompt.

    Args:
        tokenizer: has a chat template.
        conversations: messages of each conversation.
        places: file, row and field of each, for error messages.
        whole: conversations are complete and get no generation prompt.

    Returns:
        The texts, special tokens included.

    Raises:
        UserError: the template rejects a conversation (roles out of order, no system turn allowed, ...), or is broken.
    """
    from jinja2 import TemplateError

    try:
        return list(tokenizer.apply_chat_template(list(conversations), add_generation_prompt=not whole, tokenize=False))
    except TemplateError as error:
        if len(conversations) == 1:
            raise UserError(f"{places[0]}: the chat template refuses this conversation: {error}") from error
    # Render one by one, to name the row.
    return [render(tokenizer, [one], [place], whole=whole)[0] for one, place in zip(conversations, places, strict=True)]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
