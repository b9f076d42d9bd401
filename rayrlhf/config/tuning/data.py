"""Where the samples of SFT and the pairs of reward modelling come from, and how they become tokens and targets."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.data import DatasetSection
from rayrlhf.config.section import Section

DEFAULT_PAIR_SHARE = 0.1
"""Share of preference pairs held out where the configuration says nothing."""


class SupervisedDatasetSection(DatasetSection):
    """One dataset of texts, conversations, prompts with completions, or tokens: JSONL, Parquet, a built-in, or a hub name."""

    format: Literal["auto", "text", "messages", "prompt-completion", "tokens"] = "auto"
    """`auto` reads it off the columns of the first row; `tokens` where there are no others."""
    text_field: str = "text"
    """Plain text to learn whole."""
    messages_field: str = "messages"
    """A conversation: a list of {role, content}."""
    completion_field: str = "completion"
    """The answer to `prompt_field`: text, or a list of messages where the prompt is one."""
    tokens_field: str = "input_ids"
    """Token ids of the model's own tokenizer, to learn whole, as `rayrlhf icl pack` writes them; nothing is put behind them."""
    group_field: str | None = None
    """Rows of one value stay on one side of `evaluation_share`; every row for itself when not given."""


class PreferenceDatasetSection(DatasetSection):
    """One dataset of preference pairs. Without `prompt_field` the prompt is what chosen and rejected begin with alike."""

    chosen_field: str = "chosen"
    """The better answer: text, or a list of messages."""
    rejected_field: str = "rejected"
    """The worse answer, of the same kind."""
    margin_field: str = "margin"
    """By how much the better answer should win; used where the rows have it."""
    group_field: str | None = None
    """Pairs of one value stay on one side of `evaluation_share`; every pair for itself when not given."""


class TuningDataSection(Section):
    """What SFT and reward modelling share in turning rows into tokens."""

    evaluation_share: float | None = Field(None, gt=0, lt=1)
    """Share of `data.train` held out for evaluation. Which rows is decided by their group alone, so that stages agree."""
    chat: bool = True
    """Put a prompt that is text into the chat template as one user turn and its answer as the assistant's, as PPO does."""
    system_prompt: str | None = None
    """First message of every conversation that does not bring a system message of its own."""
    max_length: int = Field(1024, ge=2)
    """Most tokens of a sample; longer ones are handled by `overlong`."""
    overlong: Literal["error", "truncate", "drop"] = "error"
    """`truncate` cuts what is too long, `drop` leaves the row out; both are counted and reported."""
    invalid: Literal["error", "drop"] = "error"
    """`drop` leaves out, and counts by reason, rows with an empty answer, nothing to learn, or a pair of equals."""
    reader: Literal["auto", "driver", "ray"] = "auto"
    """Who reads and encodes rows: this process, or all CPUs of the cluster through Ray Data, which need to see the files under
    the same paths; on one machine both take as long. `auto` takes Ray Data for files of 64 MiB or more."""
    shuffle: bool = True
    """A new order every epoch, from `run.seed`; false keeps the order of the dataset."""


class SupervisedDataSection(TuningDataSection):
    """Samples of SFT. `overlong: truncate` keeps the first tokens, and drops what has no target left."""

    train: SupervisedDatasetSection
    evaluation: SupervisedDatasetSection | None = None
    loss_on: Literal["auto", "all", "completion", "assistant"] = "auto"
    """Which tokens are learnt. `auto`: the completion of a prompt, the assistant's turns of a conversation, all of a text."""

    @property
    def held_out_share(self) -> float:
        """Share of `train` that is held out: none where nothing is said."""
        return self.evaluation_share or 0.0

    @model_validator(mode="after")
    def _check_evaluation_source(self) -> Self:
        _check_one_source(self.evaluation is not None, self.evaluation_share)
        return self


class DistillationDataSection(SupervisedDataSection):
    """Samples of a student, each with another prompt that its teacher read."""

    context_field: str = "context"
    """What the teacher read in place of `prompt_field`."""


class PreferenceDataSection(TuningDataSection):
    """Pairs of reward modelling. `overlong: truncate` keeps the last tokens, since the score is read from the last one."""

    train: PreferenceDatasetSection
    evaluation: PreferenceDatasetSection | None = None

    @property
    def held_out_share(self) -> float:
        """Share of `train` that is held out: a tenth where nothing is said, none beside `evaluation`."""
        if self.evaluation is not None:
            return 0.0
        return DEFAULT_PAIR_SHARE if self.evaluation_share is None else self.evaluation_share

    @model_validator(mode="after")
    def _check_evaluation_source(self) -> Self:
        _check_one_source(self.evaluation is not None, self.evaluation_share)
        return self


def _check_one_source(has_dataset: bool, share: float | None) -> None:
    if has_dataset and share is not None:
        raise ValueError("evaluation and evaluation_share are both given; held-out rows come from one of them")
