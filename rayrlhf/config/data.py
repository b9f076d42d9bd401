"""Datasets of prompts, samples and preference pairs, and their conversion to tokens."""

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from rayrlhf.config.section import Section

TEMPLATE_FIELD = re.compile(r"\{\{(\w+)\}\}|\{(\w+)\}")
"""`{column}` of a template, or `{{text}}`, which is written with single braces."""


def _join_paths(value: object) -> object:
    listed = isinstance(value, list | tuple) and value and all(isinstance(path, str) for path in value)
    return ", ".join(value) if listed and isinstance(value, list | tuple) else value


_PATH_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
Paths = Annotated[str, BeforeValidator(_join_paths), WithJsonSchema(_PATH_SCHEMA)]
"""One path, or a list, stored with commas in between."""


def template_fields(template: str | None) -> list[str]:
    """Return the columns that a template names."""
    return [field for _, field in TEMPLATE_FIELD.findall(template or "") if field]


class SourceSection(Section):
    """Source of rows: files, a folder, a built-in (`builtin:word-problems`), or a hub name."""

    path: Paths
    """File (JSON, JSONL, CSV, TSV, Parquet; also with .gz or .zst), list of files, glob, folder of files or of `save_to_disk`,
    built-in or hub name."""
    split: str = "train"
    """Split of a hub dataset, or of a built-in."""
    subset: str | None = None
    """Configuration name of a hub dataset (`main` for `openai/gsm8k`)."""
    limit: int | None = Field(None, ge=1)
    """Maximum number of rows; the first ones are used. Default: all."""
    ignored_fields: list[str] = Field(default_factory=list)
    """Columns to leave out on purpose. Other unused columns that usually belong to the prompt, the loss or the tools are an
    error."""


class DatasetSection(SourceSection):
    """One prompt dataset: files, a folder, a built-in (`builtin:word-problems`), or a hub name."""

    prompt_field: str = "prompt"
    """Column with the prompt: text, or a list of {role, content} messages."""
    template: str | None = None
    """Text around a text prompt: `{prompt}` is replaced by the prompt, `{column}` by any other column, and `{{text}}` by
    `{text}`. Applied before the chat template. Default: none."""

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.template is not None and not template_fields(self.template):
            raise ValueError("template has no {prompt}, the place of the prompt, nor another {column}")
        return self


class DataSection(Section):
    """Prompt data for training and for evaluation."""

    train: DatasetSection
    evaluation: DatasetSection | None = None
    """Held-out prompts, for `evaluation`. Default: none."""
    chat: bool = True
    """Wrap a text prompt in the chat template as one user turn. A conversational prompt always uses the template."""
    system_prompt: str | None = None
    """First message of every conversation without a system message. Default: none."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Maximum tokens of a prompt; longer ones are handled by `overlong`. Default: the model's context minus
    `rollout.max_new_tokens`."""
    overlong: Literal["error", "truncate", "drop"] = "error"
    """Handling of longer prompts. `error` stops, `truncate` keeps the last tokens, `drop` omits and counts the row."""
    shuffle: bool = True
    """Shuffle the prompts each epoch, from `run.seed`. false keeps the order of the dataset."""


class SupervisedDatasetSection(DatasetSection):
    """One dataset of texts, conversations, prompts with completions, or tokens."""

    format: Literal["auto", "text", "messages", "prompt-completion", "tokens"] = "auto"
    """Row format. `auto` detects it from the columns of the first row; `tokens` only if there are no others."""
    text_field: str = "text"
    """Column with plain text, all of which is a target."""
    messages_field: str = "messages"
    """Column with a conversation: a list of {role, content}."""
    completion_field: str = "completion"
    """Column with the response to `prompt_field`: text, or a list of messages if the prompt is one."""
    tokens_field: str = "input_ids"
    """Column with token ids of the model's tokenizer, as written by `rayrlhf icl pack`. No token is added. All are targets
    unless a mask column says otherwise."""
    group_field: str | None = None
    """Column that groups rows: all rows of a group are held out or all are trained on. Default: every row is a group."""


class PreferenceDatasetSection(DatasetSection):
    """One dataset of preference pairs.

    Without `prompt_field` the prompt is the common start of chosen and rejected.
    """

    chosen_field: str = "chosen"
    """Column with the better answer: text, or a list of messages."""
    rejected_field: str = "rejected"
    """Column with the worse answer, in the same format."""
    margin_field: str = "margin"
    """Column with the required difference of the rewards; used if the rows have it."""
    completion_field: str = "completion"
    """Column with a single answer to `prompt_field`, for rows that are not pairs. Read by DPO's loss `kto`."""
    label_field: str = "label"
    """Column with the label of the single answer: true if it is desirable, else false."""
    group_field: str | None = None
    """Column that groups pairs: all pairs of a group are held out or all are trained on. Default: every pair is a group."""


class TuningDataSection(Section):
    """Conversion of rows to tokens, for SFT, reward models and DPO."""

    default_share: ClassVar[float] = 0.0
    """Default share of `train` held out for evaluation."""

    train: DatasetSection
    evaluation: DatasetSection | None = None
    evaluation_share: float | None = Field(None, gt=0, lt=1)
    """Share of `data.train` held out for evaluation. The choice depends only on a row's group, so all stages hold out the same
    rows."""
    chat: bool = True
    """Wrap a text prompt in the chat template as one user turn, and its answer as the assistant's, as PPO does."""
    system_prompt: str | None = None
    """First message of every conversation without a system message. Default: none."""
    max_length: int = Field(1024, ge=2)
    """Maximum tokens of a sample; longer ones are handled by `overlong`."""
    overlong: Literal["error", "truncate", "drop"] = "error"
    """Handling of longer samples. `error` stops, `truncate` cuts them, `drop` omits them; both are counted and reported."""
    invalid: Literal["error", "drop"] = "error"
    """Handling of rows with an empty answer, no target, or equal answers. `error` stops, `drop` omits and counts them by
    reason."""
    reader: Literal["auto", "driver", "ray"] = "auto"
    """Process that reads and encodes rows: the `driver`, or all CPUs of the cluster through Ray Data (`ray`), which needs the
    files at the same paths on all nodes. On one machine both take the same time. `auto` is `ray` for files of 64 MiB or
    more."""
    shuffle: bool = True
    """Shuffle each epoch, from `run.seed`. false keeps the order of the dataset."""

    @property
    def held_out_share(self) -> float:
        """Share of `train` that is held out; 0 with `evaluation`."""
        if self.evaluation is not None:
            return 0.0
        return self.default_share if self.evaluation_share is None else self.evaluation_share

    @model_validator(mode="after")
    def _check_evaluation_source(self) -> Self:
        if self.evaluation is not None and self.evaluation_share is not None:
            raise ValueError("evaluation and evaluation_share are both given: expected one of them")
        return self


class SupervisedDataSection(TuningDataSection):
    """Samples of SFT.

    `overlong: truncate` keeps the first tokens, and drops samples without a target left.
    """

    train: SupervisedDatasetSection
    evaluation: SupervisedDatasetSection | None = None
    loss_on: Literal["auto", "all", "completion", "assistant"] = "auto"
    """Target tokens. `auto`: the completion of a prompt, the assistant's turns of a conversation, all of a text."""


class DistillationDataSection(SupervisedDataSection):
    """Samples of a student, each with the prompt of its teacher."""

    context_field: str = "context"
    """Column with the teacher's prompt, in place of `prompt_field`."""


class PreferenceDataSection(TuningDataSection):
    """Preference pairs.

    `overlong: truncate` keeps the last tokens, because the score is read from the last one.
    """

    default_share = 0.1

    train: PreferenceDatasetSection
    evaluation: PreferenceDatasetSection | None = None


class RewardDatasetSection(PreferenceDatasetSection):
    """One dataset of preference pairs, or of responses with labeled steps (`kind: process`)."""

    steps_field: str = "completions"
    """Column with the steps of a response to `prompt_field`: a list of texts, or one text with `data.step_separator` between
    them. Read by `kind: process`."""
    step_labels_field: str = "labels"
    """Column with a label per step: true for a right one. Read by `kind: process`."""


class RewardDataSection(PreferenceDataSection):
    """Preference pairs, or responses with a label per step.

    `overlong: truncate` keeps the last tokens of a pair, because the score is read from the last one, and the first steps.
    """

    train: RewardDatasetSection
    evaluation: RewardDatasetSection | None = None
    step_separator: str = Field("\n", min_length=1)
    """Text after each step, including the last one; its last token has the step's score. Read by `kind: process`, and stored
    with the model."""
