"""Encoding of row batches as token ids and loss masks.

The functions are pure and picklable, so that Ray Data can map them over large files. Ids and masks equal those of TRL 1.16's
`SFTTrainer` and `RewardTrainer`. Plain text gets the tokenizer's special tokens and an end-of-sequence token; a conversation is
rendered by the chat template. A response starts at the first token in which prompt and prompt-with-response differ: both are
tokenized whole, since tokens can merge across the boundary.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rayrlhf.config.data import (
    PreferenceDataSection,
    PreferenceDatasetSection,
    RewardDataSection,
    RewardDatasetSection,
    SupervisedDataSection,
    SupervisedDatasetSection,
)
from rayrlhf.data.messages import Message, loss_free
from rayrlhf.data.records import Bool, Int32
from rayrlhf.data.row_columns import TOKEN_MASKS, used_extras
from rayrlhf.data.supervised.chat_spans import assistant_spans, crosses_a_start, tokens_in_spans
from rayrlhf.data.supervised.row_formats import Row, RowShape, answer_columns, used_columns
from rayrlhf.data.supervised.step_rows import write_steps
from rayrlhf.data.supervised.supervised_rows import (
    EQUAL,
    NOTHING,
    InvalidRowError,
    Written,
    WrittenRow,
    write_pair,
    write_supervised,
)
from rayrlhf.data.supervised.supervised_samples import DatasetReport, PreferencePair, SupervisedSample, count_tokens
from rayrlhf.data.templates import render, unwritten_keys
from rayrlhf.errors import ErrorList, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOO_LONG = "longer than data.max_length"
CUT_AWAY = "no token to learn within data.max_length"
CUT_EQUAL = "chosen equal to rejected within data.max_length"


@dataclass(frozen=True, slots=True)
class SupervisedRecipe:
    """Encoding of an SFT dataset.

    Attributes:
        section: names the columns.
        data: lengths, system prompt, target tokens.
        shape: of the first row (`supervised_shape`).
    """

    section: SupervisedDatasetSection
    data: SupervisedDataSection
    shape: RowShape
    layout: str = ""
    """Name of the format, for the plan."""

    @property
    def loss_on(self) -> str:
        """`all`, `completion` or `assistant`."""
        by_format = {"text": "all", "tokens": "all", "messages": "assistant", "prompt-completion": "completion"}
        return by_format[self.shape.format] if self.data.loss_on == "auto" else self.data.loss_on


@dataclass(frozen=True, slots=True)
class PreferenceRecipe:
    """Encoding of a preference dataset; attributes as in `SupervisedRecipe`."""

    section: PreferenceDatasetSection
    data: PreferenceDataSection
    shape: RowShape
    layout: str = ""


@dataclass(frozen=True, slots=True)
class StepRecipe:
    """Encoding of a dataset of labeled steps; attributes as in `SupervisedRecipe`."""

    section: RewardDatasetSection
    data: RewardDataSection
    shape: RowShape
    layout: str = ""


Recipe = SupervisedRecipe | PreferenceRecipe | StepRecipe


@dataclass(frozen=True, slots=True)
class _Encoded:
    token_ids: Int32
    loss_mask: Bool
    shared: int
    """Length of the common prefix of prompt and whole, in tokens."""
    rewritten: bool
    """The prompt's tokens alone are not a prefix of the whole."""


def encode_batch(
    rows: Sequence[Row], numbers: Sequence[int], recipe: SupervisedRecipe, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[SupervisedSample], DatasetReport]:
    """Encode rows of an SFT dataset, and report kept and dropped rows.

    Args:
        rows: fields as plain Python values (text, lists, numbers).
        numbers: number of each row in error messages.
        recipe: of the dataset.
        tokenizer: a fast one, with a chat template if the recipe needs one.

    Raises:
        UserError: names file, row and field: another format than the first row's, a wrong type, an empty response, a sample
            that is too long or has no target tokens (the last three depend on `data.invalid` and `data.overlong`).
    """
    data = recipe.data
    written, dropped = write_rows(rows, numbers, recipe)
    if recipe.shape.format == "tokens":
        encoded = [_given(row, len(tokenizer)) for row in written]
    else:
        encoded = _encode([(row.prompt, row.answers[0], row) for row in written], recipe.loss_on, tokenizer)
    samples: list[SupervisedSample] = []
    truncated = rewritten = endless = 0
    for row, one in zip(written, encoded, strict=True):
        if not one.loss_mask.any():
            _drop(dropped, NOTHING, f"{row.place}: not one token to learn with data.loss_on {recipe.loss_on}", data.invalid)
            continue
        if drop_overlong(dropped, len(one.token_ids), row, data):
            continue
        ids, mask = one.token_ids[: data.max_length], one.loss_mask[: data.max_length]
        if not mask.any():
            dropped[CUT_AWAY] += 1
            continue
        truncated += len(ids) < len(one.token_ids)
        rewritten += one.rewritten
        endless += not (ids[mask] == tokenizer.eos_token_id).any()
        samples.append(SupervisedSample(ids, mask, row.row))
    report = report_of(recipe, rows, samples, truncated, rewritten, dropped)
    return samples, replace(report, endless=endless, unwritten=unwritten_of(written, tokenizer))


def encode_preference_batch(
    rows: Sequence[Row], numbers: Sequence[int], recipe: PreferenceRecipe, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[PreferencePair], DatasetReport]:
    """Encode rows of a preference dataset as pairs; see `encode_batch`.

    Raises:
        UserError: as `encode_batch`; also for chosen and rejected that are equal, as text or as tokens.
    """
    if recipe.shape.format == "unpaired":
        return _encode_singles(rows, numbers, recipe, tokenizer)
    data = recipe.data
    written, dropped = write_rows(rows, numbers, recipe)
    encoded = _encode([(row.prompt, answer, row) for row in written for answer in row.answers], "completion", tokenizer)
    pairs: list[PreferencePair] = []
    truncated = rewritten = 0
    for row, chosen, rejected in zip(written, encoded[::2], encoded[1::2], strict=True):
        if np.array_equal(chosen.token_ids, rejected.token_ids):
            _drop(dropped, EQUAL, f"{row.place}: chosen and rejected have the same tokens", data.invalid)
            continue
        longest = max(len(chosen.token_ids), len(rejected.token_ids))
        if drop_overlong(dropped, longest, row, data):
            continue
        ends = [_end(one, data.max_length, row.row) for one in _answers_apart(row, chosen, rejected)]
        if np.array_equal(ends[0].token_ids, ends[1].token_ids):
            dropped[CUT_EQUAL] += 1
            continue
        truncated += longest > data.max_length
        rewritten += chosen.rewritten or rejected.rewritten
        pairs.append(PreferencePair(ends[0], ends[1], row.margin, row.row))
    report = report_of(recipe, rows, pairs, truncated, rewritten, dropped)
    return pairs, replace(report, unwritten=unwritten_of(written, tokenizer))


def _encode_singles(
    rows: Sequence[Row], numbers: Sequence[int], recipe: PreferenceRecipe, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[PreferencePair], DatasetReport]:
    """Encode labeled answers; `rejected` is the same answer until another one takes its place."""
    written, dropped = write_rows(rows, numbers, recipe)
    encoded = _encode([(row.prompt, row.answers[0], row) for row in written], "completion", tokenizer)
    singles: list[PreferencePair] = []
    rewritten = 0
    for row, one in zip(written, encoded, strict=True):
        if not one.loss_mask.any():
            _drop(dropped, NOTHING, f"{row.place}: not one token to learn", recipe.data.invalid)
        elif not drop_overlong(dropped, len(one.token_ids), row, recipe.data):
            rewritten += one.rewritten
            sample = SupervisedSample(one.token_ids, one.loss_mask, row.row)
            singles.append(PreferencePair(sample, sample, None, row.row, label=row.label))
    report = report_of(recipe, rows, singles, 0, rewritten, dropped)
    return singles, replace(report, unwritten=unwritten_of(written, tokenizer))


def write_rows(rows: Sequence[Row], numbers: Sequence[int], recipe: Recipe) -> tuple[list[WrittenRow], Counter[str]]:
    """Return the validated rows, and the number of dropped rows by reason."""
    written: list[WrittenRow] = []
    dropped: Counter[str] = Counter()
    errors = ErrorList()
    for row, number in zip(rows, numbers, strict=True):
        try:
            if isinstance(recipe, SupervisedRecipe):
                written.append(write_supervised(row, number, recipe.shape, recipe.section, recipe.data))
            elif isinstance(recipe, StepRecipe):
                separator = recipe.data.step_separator
                written.append(write_steps(row, number, recipe.shape, recipe.section, recipe.data, separator))
            else:
                written.append(write_pair(row, number, recipe.shape, recipe.section, recipe.data))
        except InvalidRowError as error:
            if recipe.data.invalid == "error" and not error.drop:
                errors.add(error)
            dropped[error.reason] += 1
        except UserError as error:
            errors.add(error)
    errors.raise_any()
    return written, dropped


def _encode(
    items: Sequence[tuple[Written | None, Written, WrittenRow]],
    loss_on: str,
    tokenizer: "PreTrainedTokenizerBase",
) -> list[_Encoded]:
    """Tokenize (prompt, whole, row) items and set loss masks.

    Items are all plain text or all conversations.
    """
    if not items:
        return []
    places = [row.place for _, _, row in items]
    options = [row.options for _, _, row in items]
    prompts = [prompt for prompt, _, _ in items if prompt is not None]
    plain = isinstance(items[0][1], str)
    if plain:
        end = str(tokenizer.eos_token)
        # As in TRL: text that already ends with the end token gets no second one.
        texts = [str(whole) if str(whole).endswith(end) else f"{whole}{end}" for _, whole, _ in items]
        heads = [str(prompt) for prompt in prompts]
    else:
        whole_ones = [whole for _, whole, _ in items if not isinstance(whole, str)]
        _check_flags(whole_ones, places, loss_on)
        texts = render(tokenizer, whole_ones, places, whole=True, options=options)
        conversations = [prompt for prompt in prompts if not isinstance(prompt, str)]
        heads = render(tokenizer, conversations, places, options=options) if prompts else []
    batch = tokenizer(
        texts, add_special_tokens=plain, return_attention_mask=False, return_offsets_mapping=loss_on == "assistant"
    )
    head_ids = tokenizer(heads, add_special_tokens=plain, return_attention_mask=False)["input_ids"] if heads else []
    crossed = [False] * len(items)
    masks: list[Bool] = [np.ones(len(ids), dtype=np.bool_) for ids in batch["input_ids"]]
    if loss_on == "assistant":
        whole_ones = [whole for _, whole, _ in items if not isinstance(whole, str)]
        spans = assistant_spans(tokenizer, whole_ones, texts, places, options)
        masks = [tokens_in_spans(*both) for both in zip(batch["offset_mapping"], spans, strict=True)]
        crossed = [crosses_a_start(*both) for both in zip(batch["offset_mapping"], spans, strict=True)]
    heads_left = iter(head_ids)
    result = []
    for (prompt, _, _), ids, mask, across in zip(items, batch["input_ids"], masks, crossed, strict=True):
        head = [] if prompt is None else next(heads_left)
        shared = common_length(head, ids)
        if loss_on != "all":
            mask[:shared] = False
        mask[:1] = False
        result.append(_Encoded(np.asarray(ids, dtype=np.int32), mask, shared, across or shared < len(head)))
    return result


def _check_flags(conversations: Sequence[list[Message]], places: Sequence[str], loss_on: str) -> None:
    """Reject messages without loss where the loss is not per message."""
    if loss_on == "assistant":
        return
    for messages, place in zip(conversations, places, strict=True):
        if loss_free(messages):
            raise UserError(
                f"{place}: a message without loss (weight, train): no effect with data.loss_on {loss_on}, expected assistant"
            )


def _given(row: WrittenRow, vocabulary: int) -> _Encoded:
    """Encode a row of token ids.

    Raises:
        UserError: an id outside the tokenizer's vocabulary.
    """
    ids = np.asarray(row.token_ids, dtype=np.int64)
    if ids.min() < 0 or ids.max() >= vocabulary:
        found = int(ids[(ids < 0) | (ids >= vocabulary)][0])
        raise UserError(f"{row.place}: token {found}: expected 0 to {vocabulary - 1}, the tokens of the model's tokenizer")
    mask: Bool = np.array(row.token_mask, dtype=np.bool_)
    mask[0] = False
    return _Encoded(ids.astype(np.int32), mask, 0, False)


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences, in tokens."""
    if second[: len(first)] == first:
        return len(first)
    least = min(len(first), len(second))
    return next((index for index in range(least) if first[index] != second[index]), least)


def _answers_apart(row: WrittenRow, chosen: _Encoded, rejected: _Encoded) -> Iterable[_Encoded]:
    """Mask the common prefix of two texts that have no explicit prompt."""
    if row.prompt is not None:
        return chosen, rejected
    shared = common_length(chosen.token_ids.tolist(), rejected.token_ids.tolist())
    for one in (chosen, rejected):
        one.loss_mask[:shared] = False
    return chosen, rejected


def _end(one: _Encoded, length: int, row: int) -> SupervisedSample:
    mask = one.loss_mask[-length:]
    mask[:1] = False
    return SupervisedSample(one.token_ids[-length:], mask, row)


def drop_overlong(
    dropped: Counter[str], length: int, row: WrittenRow, data: SupervisedDataSection | PreferenceDataSection
) -> bool:
    """Return True and count the row if it is too long and must be dropped.

    Raises:
        UserError: it is too long and `data.overlong` is `error`.
    """
    if length <= data.max_length or data.overlong == "truncate":
        return False
    if data.overlong == "error":
        raise UserError(
            f"{row.place}: {length} tokens, expected at most {data.max_length}; "
            "set data.overlong to truncate or drop, or allow more with data.max_length"
        )
    dropped[TOO_LONG] += 1
    return True


def _drop(dropped: Counter[str], reason: str, message: str, invalid: str) -> None:
    if invalid == "error":
        raise InvalidRowError(reason, message)
    dropped[reason] += 1


def unwritten_of(written: Sequence[WrittenRow], tokenizer: "PreTrainedTokenizerBase") -> frozenset[str]:
    """Return the message keys that the chat template does not write; see `unwritten_keys`."""
    turns = [(one, row) for row in written for one in row.answers or (row.prompt,) if isinstance(one, list)]
    if not turns:
        return frozenset()
    rows = [row for _, row in turns]
    return unwritten_keys(
        tokenizer, [answer for answer, _ in turns], [row.place for row in rows], [row.options for row in rows]
    )


def report_of(
    recipe: Recipe,
    rows: Sequence[Row],
    samples: Sequence[SupervisedSample] | Sequence[PreferencePair],
    truncated: int,
    rewritten: int,
    dropped: Counter[str],
) -> DatasetReport:
    """Return the counts of encoded rows, and the columns that were read."""
    tokens, targets = count_tokens(samples)
    section, shape = recipe.section, recipe.shape
    columns = {name for row in rows for name, value in row.items() if value is not None}
    used = (set(used_columns(shape, section)) & columns) | used_extras(
        columns, section, answer_columns(shape), prompts=shape.has_prompt
    )
    if shape.format == "tokens":
        used |= {*TOKEN_MASKS, "attention_mask", "position_ids"} & columns - set(section.ignored_fields)
    return DatasetReport(
        section.path,
        len(rows),
        len(samples),
        truncated,
        dict(dropped),
        tokens,
        targets,
        rewritten,
        layout=recipe.layout,
        used=frozenset(used),
        unused=frozenset(columns - used),
    )
