"""Prompt datasets: from a `data.train` or `data.evaluation` section to tokenized prompts.

Rows are read, validated, rendered through `template` and chat template, and encoded in batches by the fast tokenizer, so that
100,000 rows take seconds. A prompt's id is its row index, also when other rows are dropped, so ids are stable across runs.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from rayrlhf.config.data import DataSection, DatasetSection, template_fields
from rayrlhf.data.dataset_rows import Rows, open_rows, read_rows, recognized_prompts
from rayrlhf.data.messages import Message, as_conversation, before_last_answer, is_transcript, read_transcript
from rayrlhf.data.records import Int32, Prompt
from rayrlhf.data.row_columns import (
    INPUT,
    INSTRUCTION,
    LAST_ANSWER,
    PROMPTS,
    prompt_text,
    read_extras,
    unmet_need,
    used_extras,
    with_system,
)
from rayrlhf.data.row_files import place_of
from rayrlhf.data.templates import (
    Options,
    check_messages,
    check_turns,
    conversation,
    last_user_text,
    render,
    require_chat_template,
    unwritten_keys,
)
from rayrlhf.errors import ErrorList, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)
_CHUNK = 4096
"""Rows rendered and encoded at once: enough to keep all cores of the tokenizer busy, few enough to keep memory flat."""


@dataclass(frozen=True, slots=True)
class PromptDataset:
    """A tokenized dataset with counts of truncated and dropped prompts.

    Attributes:
        prompts: in dataset order.
        truncated: number of prompts that lost tokens on the left.
        dropped: number of rows left out because they were too long.
        unwritten: keys of messages that the chat template does not write.
    """

    prompts: list[Prompt]
    truncated: int
    dropped: int
    unwritten: frozenset[str] = frozenset()


def load_prompt_dataset(
    section: DatasetSection,
    data: DataSection,
    tokenizer: "PreTrainedTokenizerBase",
    max_prompt_tokens: int,
    needs: Mapping[str, str] = MappingProxyType({}),
) -> list[Prompt]:
    """Load prompts and log how many were truncated or dropped; see `prepare_prompts`."""
    dataset = prepare_prompts(section, data, tokenizer, max_prompt_tokens, needs)
    total = len(dataset.prompts) + dataset.dropped
    if dataset.truncated:
        _logger.warning("%s: cut %d of %d prompts to %d tokens", section.path, dataset.truncated, total, max_prompt_tokens)
    if dataset.dropped:
        _logger.warning("%s: dropped %d of %d prompts above %d tokens", section.path, dataset.dropped, total, max_prompt_tokens)
    if dataset.unwritten:
        keys = ", ".join(sorted(dataset.unwritten))
        _logger.warning("%s: message keys that the chat template does not write: %s", section.path, keys)
    return dataset.prompts


def describe_columns(section: DatasetSection, prompts: Sequence[Prompt], read: Collection[str] | None) -> str:
    """Return format and columns of a prompt dataset in words.

    Args:
        section: the dataset.
        prompts: loaded from it.
        read: columns that reward functions read; None if other code gets all of them.
    """
    section, layout = recognized_prompts(section, open_rows(section))
    others = {name for prompt in prompts for name, value in prompt.columns.items() if value is not None}
    used = used_extras(others, section, PROMPTS)
    passed = (others if read is None else others & set(read)) - used
    text = f"{section.path}: read as {layout}: {', '.join([section.prompt_field, *sorted(used)])}"
    text += f"; for rewards: {', '.join(sorted(passed))}" if passed else ""
    unused = others - used - passed
    return text + (f"; not used: {', '.join(sorted(unused))}" if unused else "")


def read_prompts(section: DatasetSection) -> list[str | list[Message]]:
    """Read the prompts of all rows as text or messages, with `template` applied.

    Raises:
        UserError: no such file or field, or a prompt that is empty or of a wrong type.
    """
    rows = read_rows(section)
    return [prompt for prompt, _ in _read_all(rows, section, chat=True)]


def prepare_prompts(
    section: DatasetSection,
    data: DataSection,
    tokenizer: "PreTrainedTokenizerBase",
    max_prompt_tokens: int,
    needs: Mapping[str, str] = MappingProxyType({}),
) -> PromptDataset:
    """Read, validate, template and encode a dataset.

    Args:
        section: the dataset.
        data: chat template, system prompt, handling of long prompts.
        tokenizer: of the policy.
        max_prompt_tokens: maximum prompt length in tokens; `data.overlong` defines the handling of longer ones.
        needs: columns that every row must have, and the setting that needs each.

    Raises:
        UserError: names file, row and field: no such file or field, a wrong type, an empty or too long prompt, no rows, no
            chat template; or no prompt is left after dropping.
    """
    rows = read_rows(section)
    check_needs(rows, needs)
    read = _read_all(rows, section, chat=data.chat)
    prompts, options = [prompt for prompt, _ in read], [option for _, option in read]
    unwritten: frozenset[str] = frozenset()
    encoded: list[list[int]] = []
    for start in range(0, len(prompts), _CHUNK):
        places = [rows.place(index) for index in range(start, min(start + _CHUNK, len(prompts)))]
        part, own = prompts[start : start + _CHUNK], options[start : start + _CHUNK]
        encoded += _encode(part, places, data, tokenizer, own)
        chats = [prompt if isinstance(prompt, list) else [] for prompt in part]
        unwritten |= unwritten_keys(tokenizer, chats, places, own)
    kept: list[Prompt] = []
    truncated = dropped = 0
    for index, token_ids in enumerate(encoded):
        if len(token_ids) > max_prompt_tokens:
            if data.overlong == "error":
                raise UserError(
                    f"{rows.place(index)}: {len(token_ids)} tokens, expected at most {max_prompt_tokens}; "
                    "set data.overlong to truncate or drop, or allow more with data.max_prompt_tokens"
                )
            if data.overlong == "drop":
                dropped += 1
                continue
            truncated += 1
        columns = {name: value for name, value in rows.values[index].items() if name != rows.prompt_field}
        prompt = prompts[index]
        messages = None if isinstance(prompt, str) else prompt
        kept.append(Prompt(index, last_user_text(prompt), _last(token_ids, max_prompt_tokens), columns, messages=messages))
    if not kept:
        raise UserError(f"{section.path}: all {dropped} prompts are longer than {max_prompt_tokens} tokens and were dropped")
    return PromptDataset(kept, truncated, dropped, unwritten)


def check_needs(rows: Rows, needs: Mapping[str, str]) -> None:
    """Check that every row has the columns that rewards need.

    Null is a value: the function gets None.

    Raises:
        UserError: a row has no such column.
    """
    errors = ErrorList()
    for number, row in zip(rows.numbers, rows.values, strict=True) if needs else ():
        if lacks := unmet_need(row, needs):
            columns = ", ".join(map(str, row)) or "none"
            place = place_of(rows.source, number)
            remedy = "add it (null where it does not apply), or set the function's argument"
            errors.add(UserError(f"{place}: {lacks}; the row's columns are: {columns}; {remedy}"))
    errors.raise_any()


def _read_all(rows: Rows, section: DatasetSection, *, chat: bool) -> list[tuple[str | list[Message], Options | None]]:
    """Return prompt and template arguments of each row.

    Raises:
        UserError: names up to 20 wrong rows.
    """
    read, errors = [], ErrorList()
    for index in range(len(rows.values)):
        try:
            read.append(_prompt_of(rows, index, section, chat=chat))
        except UserError as error:
            if index == 0 and rows.prompt_field not in rows.values[0]:
                raise  # the dataset has no such column
            errors.add(error)
    errors.raise_any()
    return read


def _prompt_of(rows: Rows, index: int, section: DatasetSection, *, chat: bool) -> tuple[str | list[Message], Options | None]:
    row, field = rows.values[index], rows.prompt_field
    place, where = place_of(rows.source, rows.numbers[index]), rows.place(index)
    named = template_fields(section.template)
    needed = not named or "prompt" in named
    if field not in row and needed:
        chosen = as_conversation(row.get("chosen"))
        pair = isinstance(chosen, list) or is_transcript(chosen)
        remedy = "prompt_field=chosen takes it without its last answer" if pair else "name the right one in prompt_field"
        raise UserError(f"{where}: the row has no such field, only {', '.join(map(str, row)) or 'none'}; {remedy}")
    value: Any = as_conversation(row.get(field))
    opening = rows.layout.endswith(LAST_ANSWER)
    if opening and is_transcript(value):
        value = read_transcript(value) if chat else before_last_answer(value)
    used = {field, *named, *((INPUT,) if field == INSTRUCTION else ())}
    extras = read_extras(row, used, PROMPTS, section.ignored_fields, place, turns=chat or isinstance(value, list))
    if isinstance(value, list):
        if section.template is not None:
            raise UserError(f"{where}: template: no effect on conversations, expected prompts as text")
        turns = check_turns(value, where)
        if opening and turns[-1]["role"] == "assistant" and len(turns) > 1:
            turns = turns[:-1]
        messages = check_messages(turns, where)
        return with_system(messages, extras.system, place), extras.options
    if not isinstance(value, str) and needed:
        raise UserError(f"{where}: expected text or a list of {{role, content}}, found {type(value).__name__}")
    text = prompt_text(row, value if isinstance(value, str) else "", field, section.template, place)
    if not (value if needed else text).strip():
        raise UserError(f"{where}: the prompt is empty")
    if extras.system is None:
        return text, extras.options
    return with_system([{"role": "user", "content": text}], extras.system, place), extras.options


def _encode(
    prompts: list[str | list[Message]],
    places: list[str],
    data: DataSection,
    tokenizer: "PreTrainedTokenizerBase",
    options: list[Options | None],
) -> list[list[int]]:
    """Return token ids of each prompt.

    The chat template writes the special tokens of a conversation, the tokenizer those of plain text.
    """
    chat = [data.chat or not isinstance(prompt, str) for prompt in prompts]
    if any(chat):
        require_chat_template(tokenizer)
    rendered = [index for index, through_template in enumerate(chat) if through_template]
    plain = [index for index, through_template in enumerate(chat) if not through_template]
    conversations = [conversation(prompts[index], data.system_prompt) for index in rendered]
    own = [options[index] for index in rendered]
    texts = render(tokenizer, conversations, [places[index] for index in rendered], options=own) if rendered else []
    result: list[list[int]] = [[] for _ in prompts]
    for indices, chunk, special in ((rendered, texts, False), (plain, [str(prompts[index]) for index in plain], True)):
        if indices:
            batch = tokenizer(chunk, add_special_tokens=special, return_attention_mask=False)["input_ids"]
            for index, token_ids in zip(indices, batch, strict=True):
                result[index] = token_ids
    for index, token_ids in enumerate(result):
        if not token_ids:
            raise UserError(f"{places[index]}: the prompt is empty")
    return result


def _last(token_ids: list[int], count: int) -> Int32:
    return np.asarray(token_ids[-count:], dtype=np.int32)
