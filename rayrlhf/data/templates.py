"""Conversations: validation of messages and rendering through the chat template.

A prompt is text or a list of {role, content} messages. Text becomes one user turn, unless the chat template is switched off.
The rendered text is final: it is encoded without adding special tokens, because the template writes them.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rayrlhf.data.messages import Message, extra_keys, standard_message
from rayrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of an assistant's reasoning in public datasets."""


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
    if messages[-1]["role"] == "user" and not messages[-1]["content"].strip():
        raise UserError(f"{where}: the prompt is empty: the last message has no text")
    return messages


def check_turns(value: Sequence[Any], where: str) -> list[Message]:
    """Validate each message, with any role first and last.

    Args:
        value: the row's value.
        where: file, row and field, for error messages.

    Raises:
        UserError: no messages, or see `standard_message`.
    """
    if not value:
        raise UserError(f"{where}: the conversation is empty, expected at least one message")
    return [standard_message(message, f"{where}: message {number}") for number, message in enumerate(value, start=1)]


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
        UserError: it has no chat template, or several without a default.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template; "
            "set model.chat_template to a Jinja file, or data.chat to false for plain text prompts"
        )
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has the chat templates "
            f"{', '.join(tokenizer.chat_template)} and no default; set model.chat_template to a Jinja file"
        )


Options = Mapping[str, Any]
"""Arguments of the chat template for one conversation: `tools`, and a row's `chat_template_kwargs`."""


def render(
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Sequence[list[Message]],
    places: Sequence[str],
    *,
    whole: bool = False,
    options: Sequence[Options | None] | None = None,
) -> list[str]:
    """Render conversations through the chat template, each with a generation prompt.

    Args:
        tokenizer: has a chat template.
        conversations: messages of each conversation.
        places: file, row and field of each, for error messages.
        whole: conversations are complete and get no generation prompt.
        options: of each conversation.

    Returns:
        The texts, special tokens included.

    Raises:
        UserError: the template rejects a conversation (roles out of order, no system turn allowed, ...) or is broken.
    """
    from jinja2 import TemplateError

    if options is not None and any(options):
        return [
            _render_one(tokenizer, one, place, option or {}, whole=whole)
            for one, place, option in zip(conversations, places, options, strict=True)
        ]
    try:
        return list(tokenizer.apply_chat_template(list(conversations), add_generation_prompt=not whole, tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):  # Render one by one, to name the row.
        pass
    return [_render_one(tokenizer, one, place, {}, whole=whole) for one, place in zip(conversations, places, strict=True)]


def _render_one(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], place: str, options: Options, *, whole: bool
) -> str:
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=not whole, tokenize=False, **options))
    except TemplateSyntaxError as error:
        raise UserError(
            f"the chat template is not Jinja: {error.message} in line {error.lineno}; correct it, or set model.chat_template"
        ) from error
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{place}: the chat template refuses this conversation: {error}") from error


def unwritten_keys(
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Sequence[list[Message]],
    places: Sequence[str],
    options: Sequence[Options | None],
) -> frozenset[str]:
    """Return the message keys that the chat template does not write.

    Raises:
        UserError: these are tools, tool calls or reasoning, or arguments of `chat_template_kwargs`: the text would lack them.
    """
    template: str | None = None
    unwritten: set[str] = set()
    for messages, place, option in zip(conversations, places, options, strict=True):
        keys = extra_keys(messages)
        if not keys and not option:
            continue
        template = template or tokenizer.get_chat_template(tools=option.get("tools") if option else None)
        missing = {key for key in keys if key not in template}
        needed = [key for key in ("tool_calls", *REASONING) if key in missing]
        for key in [*needed, *(key for key in option or () if key not in template)]:
            raise UserError(
                f"{place}: {key}: the chat template does not write it; expected one that does (model.chat_template), or rows "
                "without it"
            )
        unwritten |= missing
    return frozenset(unwritten)
