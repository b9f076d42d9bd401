"""Prompt datasets: from a `data.train` or `data.evaluation` section to tokenized prompts.

Rows are read, validated, rendered through `template` and chat template, and encoded in batches by the fast tokenizer, so that
100,000 rows take seconds. A prompt's id is its row index, also when other rows are dropped, so ids are stable across runs.
"""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rayrlhf.config.data import DataSection, DatasetSection
from rayrlhf.data.dataset_rows import Rows, read_rows
from rayrlhf.data.records import Int32, Prompt
from rayrlhf.data.templates import Message, check_messages, conversation, last_user_text, render, require_chat_template
from rayrlhf.errors import UserError

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
    """

    prompts: list[Prompt]
    truncated: int
    dropped: int


def load_prompt_dataset(
    section: DatasetSection, data: DataSection, tokenizer: "PreTrainedTokenizerBase", max_prompt_tokens: int
) -> list[Prompt]:
    """Load prompts and log how many were truncated or dropped; see `prepare_prompts`."""
    dataset = prepare_prompts(section, data, tokenizer, max_prompt_tokens)
    total = len(dataset.prompts) + dataset.dropped
    if dataset.truncated:
        _logger.warning("%s: cut %d of %d prompts to %d tokens", section.path, dataset.truncated, total, max_prompt_tokens)
    if dataset.dropped:
        _logger.warning("%s: dropped %d of %d prompts above %d tokens", section.path, dataset.dropped, total, max_prompt_tokens)
    return dataset.prompts


def read_prompts(section: DatasetSection) -> list[str | list[Message]]:
    """Read the prompts of all rows as text or messages, with `template` applied.

    Raises:
        UserError: no such file or field, or a prompt that is empty or of a wrong type.
    """
    rows = read_rows(section)
    return [_prompt_of(rows, index, section) for index in range(len(rows.values))]


def prepare_prompts(
    section: DatasetSection, data: DataSection, tokenizer: "PreTrainedTokenizerBase", max_prompt_tokens: int
) -> PromptDataset:
    """Read, validate, template and encode a dataset.

    Args:
        section: the dataset.
        data: chat template, system prompt, handling of long prompts.
        tokenizer: of the policy.
        max_prompt_tokens: maximum prompt length in tokens; `data.overlong` defines the handling of longer ones.

    Raises:
        UserError: names file, row and field: no such file or field, a wrong type, an empty or too long prompt, no rows, no
            chat template; or no prompt is left after dropping.
    """
    rows = read_rows(section)
    prompts = [_prompt_of(rows, index, section) for index in range(len(rows.values))]
    encoded: list[list[int]] = []
    for start in range(0, len(prompts), _CHUNK):
        places = [rows.place(index) for index in range(start, min(start + _CHUNK, len(prompts)))]
        encoded += _encode(prompts[start : start + _CHUNK], places, data, tokenizer)
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
    return PromptDataset(kept, truncated, dropped)


def _prompt_of(rows: Rows, index: int, section: DatasetSection) -> str | list[Message]:
    row = rows.values[index]
    if rows.prompt_field not in row:
        raise UserError(
            f"{rows.place(index)}: the row has no such field, only {', '.join(map(str, row)) or 'none'}; "
            "name the right one in prompt_field"
        )
    value: Any = row[rows.prompt_field]
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{rows.place(index)}: the prompt is empty")
        return value if section.template is None else section.template.replace("{prompt}", value)
    if isinstance(value, list):
        return check_messages(value, rows.place(index))
    raise UserError(f"{rows.place(index)}: expected text or a list of {{role, content}}, found {type(value).__name__}")


def _encode(
    prompts: list[str | list[Message]], places: list[str], data: DataSection, tokenizer: "PreTrainedTokenizerBase"
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
    texts = render(tokenizer, conversations, [places[index] for index in rendered]) if rendered else []
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
