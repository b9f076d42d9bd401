"""From what a dataset row says to the text a model reads: messages, checks, and the tokenizer's chat template.

A prompt is text or a list of {role, content} messages. Text becomes one user turn, unless the chat template is switched off.
The rendered text is final: it is encoded without adding special tokens, because a template writes them itself.
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
    """Return a conversation that waits for an answer as messages after checking it; `where` as in `check_turns`.

    Raises:
        UserError: as `check_turns`, or an end that leaves nothing to answer.
    """
    messages = check_turns(value, where)
    if messages[-1]["role"] not in ("user", "tool"):
        raise UserError(
            f"{where}: the last message is from the {messages[-1]['role']}, expected the user's, for the model to answer"
        )
    return messages


def check_turns(value: Sequence[Any], where: str) -> list[Message]:
    """Return messages after checking each of them, whoever is first and last.

    Args:
        value: what the row holds.
        where: file, row and field, for messages of errors.

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
    """Return the messages of a prompt, text as one user turn, with the system prompt in front unless it brings its own."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def last_user_text(prompt: str | list[Message]) -> str:
    """Return what the user said last: the prompt itself, or the content of the last user turn ("" where there is none)."""
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
    """Render conversations through the chat template, each opened for the model's answer.

    Args:
        tokenizer: has a chat template.
        conversations: messages of each.
        places: file, row and field of each, for messages of errors.
        whole: the conversation is complete, so none is opened.

    Returns:
        The texts, special tokens written out.

    Raises:
        UserError: the template refuses a conversation (roles out of order, no system turn allowed, ...), or is broken.
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
