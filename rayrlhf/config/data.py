"""Where prompts come from and how they become tokens."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import Section


class DatasetSection(Section):
    """One prompt dataset: JSONL, Parquet, a built-in (`builtin:word-problems`), or a hub name."""

    path: str
    """Also a folder in the hub's layout, or one that `save_to_disk` of the `datasets` package wrote."""
    split: str = "train"
    """Split of a hub dataset, or of a built-in."""
    subset: str | None = None
    """Configuration name of a hub dataset (`main` for `openai/gsm8k`)."""
    prompt_field: str = "prompt"
    """Text, or a list of {role, content} messages."""
    template: str | None = None
    """Text around a standard prompt, with `{prompt}` where it goes; before the chat template."""
    limit: int | None = Field(None, ge=1)
    """Use only the first n rows."""

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.template is not None and "{prompt}" not in self.template:
            raise ValueError("template has no {prompt} in it, where the prompt goes")
        return self


class DataSection(Section):
    """Prompt data for training and for evaluation."""

    train: DatasetSection
    evaluation: DatasetSection | None = None
    chat: bool = True
    """Put a standard prompt into the chat template as one user turn; a conversational prompt always goes through it."""
    system_prompt: str | None = None
    """First message of every conversation that does not bring a system message of its own."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Longer prompts are handled by `overlong`; the model's context less `rollout.max_new_tokens` when not given."""
    overlong: Literal["error", "truncate", "drop"] = "error"
    """`truncate` keeps the last tokens (the left side is cut), `drop` leaves the row out and counts it."""
    shuffle: bool = True
    """A new order every epoch, from `run.seed`; false keeps the order of the dataset."""
