"""Encoding of responses whose steps have labels.

Of plain text, ids and labels equal those of TRL 1.8's `PRMTrainer`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from rayrlhf.data.answer_format import plain_prompt_ids, step_tokens
from rayrlhf.data.supervised.encoding import CUT_AWAY, StepRecipe, drop_overlong, report_of, unwritten_of, write_rows
from rayrlhf.data.supervised.row_formats import Row
from rayrlhf.data.supervised.supervised_rows import WrittenRow
from rayrlhf.data.supervised.supervised_samples import DatasetReport, StepSample
from rayrlhf.data.templates import render
from rayrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_step_batch(
    rows: Sequence[Row], numbers: Sequence[int], recipe: StepRecipe, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[StepSample], DatasetReport]:
    """Encode rows of labeled steps; see `rayrlhf.data.supervised.encoding.encode_batch`.

    Raises:
        UserError: as `encode_batch`; also for labels that are not those of the steps.
    """
    data = recipe.data
    written, dropped = write_rows(rows, numbers, recipe)
    samples: list[StepSample] = []
    truncated = 0
    for row, prompt in zip(written, _prompts(written, tokenizer), strict=True):
        ids, ends = step_tokens(tokenizer, prompt, row.steps, data.step_separator)
        if drop_overlong(dropped, len(ids), row, data):
            continue
        mask, right = np.zeros(len(ids), dtype=np.bool_), np.zeros(len(ids), dtype=np.bool_)
        mask[ends], right[ends] = True, row.right
        mask, right = mask[: data.max_length], right[: data.max_length]
        if not mask.any():
            dropped[CUT_AWAY] += 1
            continue
        truncated += len(mask) < len(ids)
        samples.append(StepSample(np.asarray(ids[: data.max_length], dtype=np.int32), mask, row.row, right))
    report = report_of(recipe, rows, samples, truncated, 0, dropped)
    return samples, replace(report, unwritten=unwritten_of(written, tokenizer))


def _prompts(written: Sequence[WrittenRow], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Return the tokens of all prompts, which are all plain text or all conversations."""
    conversations = [row.prompt for row in written if isinstance(row.prompt, list)]
    if not conversations:
        return [plain_prompt_ids(tokenizer, str(row.prompt)) for row in written]
    texts = render(tokenizer, conversations, [row.place for row in written], options=[row.options for row in written])
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return ids


def check_separator(tokenizer: "PreTrainedTokenizerBase", separator: str, key: str) -> None:
    """Check that a tokenizer can write the separator of steps; messages name the setting `key`.

    Raises:
        UserError: it writes nothing, or an unknown token.
    """
    ids = tokenizer(separator, add_special_tokens=False)["input_ids"]
    if not ids or tokenizer.unk_token_id in ids:
        raise UserError(
            f"{key} {separator!r}: not found in the vocabulary of the tokenizer of {tokenizer.name_or_path or 'the model'}; "
            "expected text that it has tokens for"
        )
