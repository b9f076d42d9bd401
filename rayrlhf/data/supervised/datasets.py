"""SFT and preference datasets: from a configuration section to tokens and masks.

All data errors are found here, with the tokenizer loaded and no model yet. A tokenizer needs no pad token: samples are stored
unpadded, and masks exclude the padding of a batch.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from rayrlhf.config.data import (
    PreferenceDataSection,
    PreferenceDatasetSection,
    RewardDataSection,
    RewardDatasetSection,
    SupervisedDataSection,
    SupervisedDatasetSection,
    TuningDataSection,
)
from rayrlhf.data.answer_format import AnswerFormat
from rayrlhf.data.dataset_rows import RowSource, open_rows
from rayrlhf.data.holdout import group_key, held_out
from rayrlhf.data.row_columns import recognized
from rayrlhf.data.row_files import place_of
from rayrlhf.data.row_slices import RowSlice
from rayrlhf.data.supervised.encoding import (
    PreferenceRecipe,
    StepRecipe,
    SupervisedRecipe,
    encode_batch,
    encode_preference_batch,
)
from rayrlhf.data.supervised.row_formats import Row, RowShape, preference_shape, step_shape, supervised_shape
from rayrlhf.data.supervised.step_encoding import check_separator, encode_step_batch
from rayrlhf.data.supervised.supervised_samples import (
    DatasetReport,
    PreferencePair,
    StepSample,
    SupervisedSample,
    count_tokens,
)
from rayrlhf.data.templates import require_chat_template
from rayrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DatasetReport",
    "PreferencePair",
    "PreferenceRecipe",
    "SampleDataset",
    "SupervisedRecipe",
    "SupervisedSample",
    "encode_batch",
    "encode_preference_batch",
    "load_preference_data",
    "load_preferences",
    "load_supervised",
    "load_supervised_data",
    "preference_recipe",
    "supervised_recipe",
]

T = TypeVar("T", SupervisedSample, PreferencePair, StepSample)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SampleDataset(Generic[T]):
    """Samples in the order of their rows.

    Attributes:
        samples: `SupervisedSample`, `PreferencePair` or `StepSample`.
        report: counts of kept, truncated and dropped rows.
        groups: the group of each sample, for held-out splits.
        format: text format of a prompt with its response, for pairs and steps.
    """

    samples: list[T]
    report: DatasetReport
    groups: list[str]
    format: AnswerFormat | None = None


SupervisedDataset = SampleDataset[SupervisedSample]
PreferenceDataset = SampleDataset[PreferencePair]
StepDataset = SampleDataset[StepSample]


class SliceMapper(Protocol):
    """Maps a function over dataset slices, in this process or on a cluster."""

    def __call__(self, work: Callable[[RowSlice], SampleDataset[T]], slices: Sequence[RowSlice]) -> Iterable[SampleDataset[T]]:
        """Return the result of `work`, which is pure and picklable, for each slice, in order."""
        ...


def map_in_order(work: Callable[[RowSlice], SampleDataset[T]], slices: Sequence[RowSlice]) -> Iterable[SampleDataset[T]]:
    """Encode the slices sequentially in this process."""
    return map(work, slices)


def load_supervised(
    section: SupervisedDatasetSection,
    data: SupervisedDataSection,
    tokenizer: "PreTrainedTokenizerBase",
    map_slices: SliceMapper = map_in_order,
) -> SupervisedDataset:
    """Read, validate and encode an SFT dataset, and log truncated and dropped rows.

    Raises:
        UserError: names file, row and field: see `open_rows`, `supervised_recipe` and `encode_batch`; or no row is left.
    """
    rows = open_rows(section)
    # Built-in datasets define their own prompt column.
    section = section.model_copy(update={"prompt_field": rows.prompt_field})
    number, row = rows.first()
    recipe = supervised_recipe(row, number, section, data, tokenizer)
    return _load(rows, section.group_field, partial(encode_batch, recipe=recipe, tokenizer=tokenizer), map_slices)


def load_preferences(
    section: PreferenceDatasetSection,
    data: PreferenceDataSection,
    tokenizer: "PreTrainedTokenizerBase",
    map_slices: SliceMapper = map_in_order,
    *,
    labels: bool = False,
) -> PreferenceDataset:
    """Read, validate and encode a preference dataset; see `load_supervised`.

    `labels` also reads single answers with a label.

    Raises:
        UserError: names file, row and field: see `open_rows`, `preference_recipe` and `encode_preference_batch`.
    """
    rows = open_rows(section)
    section = section.model_copy(update={"prompt_field": rows.prompt_field})
    number, row = rows.first()
    recipe = preference_recipe(row, number, section, data, tokenizer, labels=labels)
    encode = partial(encode_preference_batch, recipe=recipe, tokenizer=tokenizer)
    return replace(_load(rows, section.group_field, encode, map_slices), format=answer_format(recipe, tokenizer))


def load_supervised_data(
    data: SupervisedDataSection, tokenizer: "PreTrainedTokenizerBase", map_slices: SliceMapper = map_in_order
) -> tuple[SupervisedDataset, SupervisedDataset | None]:
    """Load the training samples and the held-out ones, if any.

    Held out is `data.evaluation`, or a share of `data.train`.

    Raises:
        UserError: see `load_supervised`; or too few groups to hold any out.
    """
    train = load_supervised(data.train, data, tokenizer, map_slices)
    if data.evaluation is not None:
        return _with_evaluation(train, load_supervised(data.evaluation, data, tokenizer, map_slices))
    return _divide(train, data.held_out_share) if data.held_out_share else (train, None)


def load_preference_data(
    data: PreferenceDataSection,
    tokenizer: "PreTrainedTokenizerBase",
    map_slices: SliceMapper = map_in_order,
    *,
    labels: bool = False,
) -> tuple[PreferenceDataset, PreferenceDataset | None]:
    """Load the training pairs and the held-out ones; see `load_supervised_data` and `load_preferences`.

    Raises:
        UserError: see `load_preferences`; or too few groups to hold any out.
    """
    train = load_preferences(data.train, data, tokenizer, map_slices, labels=labels)
    if data.evaluation is not None:
        return _with_evaluation(train, load_preferences(data.evaluation, data, tokenizer, map_slices, labels=labels))
    return _divide(train, data.held_out_share) if data.held_out_share else (train, None)


def load_step_data(
    data: RewardDataSection, tokenizer: "PreTrainedTokenizerBase", map_slices: SliceMapper = map_in_order
) -> tuple[StepDataset, StepDataset | None]:
    """Load the training responses with labeled steps and the held-out ones; see `load_supervised_data`.

    Raises:
        UserError: names file, row and field: see `open_rows`, `step_shape` and `encode_step_batch`; the tokenizer cannot write
            the separator; or too few groups to hold any out.
    """
    check_separator(tokenizer, data.step_separator, "data.step_separator")
    train = _load_steps(data.train, data, tokenizer, map_slices)
    if data.evaluation is not None:
        return _with_evaluation(train, _load_steps(data.evaluation, data, tokenizer, map_slices))
    return _divide(train, data.held_out_share) if data.held_out_share else (train, None)


def _load_steps(
    section: RewardDatasetSection, data: RewardDataSection, tokenizer: "PreTrainedTokenizerBase", map_slices: SliceMapper
) -> StepDataset:
    rows = open_rows(section)
    section = section.model_copy(update={"prompt_field": rows.prompt_field})
    number, row = rows.first()
    recipe = StepRecipe(section, data, step_shape(row, section, place_of(section.path, number)), "steps with labels")
    chat = _is_chat(recipe.shape, data)
    if chat:
        require_chat_template(tokenizer)
    elif data.system_prompt is not None:
        raise UserError("data.system_prompt: has no effect with plain text, expected conversations or data.chat true")
    encode = partial(encode_step_batch, recipe=recipe, tokenizer=tokenizer)
    stored = AnswerFormat(chat=chat, system_prompt=data.system_prompt if chat else None, step_separator=data.step_separator)
    return replace(_load(rows, section.group_field, encode, map_slices), format=stored)


def _with_evaluation(train: SampleDataset[T], evaluation: SampleDataset[T]) -> tuple[SampleDataset[T], SampleDataset[T]]:
    return replace(train, report=replace(train.report, further=tuple(evaluation.report.lines()))), evaluation


def supervised_recipe(
    row: Row,
    number: int,
    section: SupervisedDatasetSection,
    data: SupervisedDataSection,
    tokenizer: "PreTrainedTokenizerBase",
) -> SupervisedRecipe:
    """Infer the encoding of an SFT dataset from its first row.

    Args:
        row: the first row.
        number: its number in error messages.
        section: names the dataset and its columns.
        data: lengths, chat template, system prompt, target tokens.
        tokenizer: of the model.

    Raises:
        UserError: columns of no known format; the format has no such target tokens; or the tokenizer lacks a chat template,
            an end-of-sequence token, or character offsets that are needed.
    """
    place = place_of(section.path, number)
    section, layout = recognized(row, section, "samples")
    recipe = SupervisedRecipe(section, data, supervised_shape(row, section, place), layout)
    shape = recipe.shape
    chat = _is_chat(shape, data)
    _check_tokenizer(tokenizer, chat, data)
    if data.loss_on == "completion" and shape.format != "prompt-completion":
        raise UserError(f"{place}: data.loss_on completion: expected prompts with completions, found format {shape.format}")
    if data.loss_on == "assistant" and not chat:
        raise UserError(f"{place}: data.loss_on assistant: expected conversations, found plain text ({shape.format})")
    if recipe.loss_on == "assistant" and not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} gives no character offsets, so the assistant's "
            "tokens are unknown; expected a fast tokenizer, or data.loss_on all"
        )
    return recipe


def preference_recipe(
    row: Row,
    number: int,
    section: PreferenceDatasetSection,
    data: PreferenceDataSection,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    labels: bool = False,
) -> PreferenceRecipe:
    """Infer the encoding of a preference dataset from its first row; see `supervised_recipe`.

    Raises:
        UserError: the columns are not those of pairs, or the tokenizer lacks a chat template or end-of-sequence token.
    """
    section, layout = recognized(row, section, "pairs")
    shape = preference_shape(row, section, place_of(section.path, number), transcripts=data.chat, labels=labels)
    layout = "answers with labels (KTO)" if shape.format == "unpaired" else layout
    _check_tokenizer(tokenizer, _is_chat(shape, data), data)
    return PreferenceRecipe(section, data, shape, layout)


def answer_format(recipe: PreferenceRecipe, tokenizer: "PreTrainedTokenizerBase") -> AnswerFormat:
    """Return the text format of a preference dataset, to score with its model."""
    if _is_chat(recipe.shape, recipe.data):
        return AnswerFormat(system_prompt=recipe.data.system_prompt)
    return AnswerFormat(chat=False, end=str(tokenizer.eos_token))


def _is_chat(shape: RowShape, data: TuningDataSection) -> bool:
    """Return True if samples use the chat template; text without a prompt has no turns."""
    return shape.conversational or (data.chat and shape.has_prompt)


def _check_tokenizer(tokenizer: "PreTrainedTokenizerBase", chat: bool, data: TuningDataSection) -> None:
    if chat:
        require_chat_template(tokenizer)
        return
    if data.system_prompt is not None:
        raise UserError("data.system_prompt: has no effect with plain text, expected conversations or data.chat true")
    if tokenizer.eos_token is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no end-of-sequence token to append to plain text; "
            "set eos_token in its tokenizer_config.json"
        )


Encode = Callable[[Sequence[Row], Sequence[int]], tuple[list[T], DatasetReport]]


def _load(rows: RowSource, group_field: str | None, encode: Encode[T], map_slices: SliceMapper) -> SampleDataset[T]:
    whole: SampleDataset[T] = SampleDataset([], DatasetReport(rows.source), [])
    for part in map_slices(partial(_encode_slice, source=rows.source, group_field=group_field, encode=encode), rows.slices):
        whole = _joined(whole, part)
    for line in whole.report.changes():
        _logger.warning(line)
    if not whole.samples:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(whole.report.dropped.items()))
        raise UserError(f"{rows.source}: all {whole.report.rows} rows were dropped: {reasons}")
    return whole


def _encode_slice(one: RowSlice, source: str, group_field: str | None, encode: Encode[T]) -> SampleDataset[T]:
    """Read and encode a slice; pure, so it can run in any process."""
    whole: SampleDataset[T] = SampleDataset([], DatasetReport(source), [])
    for numbers, values in one.chunks():
        samples, report = encode(values, numbers)
        by_row = {
            number: group_key(number if group_field is None else value[group_field])
            for number, value in zip(numbers, values, strict=True)
        }
        whole = _joined(whole, SampleDataset(samples, report, [by_row[sample.row] for sample in samples]))
    return whole


def _joined(whole: SampleDataset[T], part: SampleDataset[T]) -> SampleDataset[T]:
    """Append a part to the lists of `whole`."""
    whole.samples.extend(part.samples)
    whole.groups.extend(part.groups)
    return replace(whole, report=whole.report + part.report)


def _divide(dataset: SampleDataset[T], share: float) -> tuple[SampleDataset[T], SampleDataset[T]]:
    """Split a dataset into training and held-out samples."""
    source = dataset.report.source
    if len(set(dataset.groups)) < 2:
        raise UserError(
            f"{source}: data.evaluation_share {share:g}: expected rows of at least two groups, found {len(set(dataset.groups))}"
        )
    held = held_out(dataset.groups, share)
    train, evaluation = (_select(dataset, [index for index, out in enumerate(held) if out is side]) for side in (False, True))
    report = replace(dataset.report, kept=train.report.kept, tokens=train.report.tokens, held_out=evaluation.report.kept)
    report = replace(report, target_tokens=train.report.target_tokens)
    return replace(train, report=report), evaluation


def _select(dataset: SampleDataset[T], indices: Sequence[int]) -> SampleDataset[T]:
    samples = [dataset.samples[index] for index in indices]
    tokens, targets = count_tokens(samples)
    source = f"{dataset.report.source} (held out)"
    report = DatasetReport(source, len(samples), len(samples), tokens=tokens, target_tokens=targets)
    return SampleDataset(samples, report, [dataset.groups[index] for index in indices], dataset.format)
