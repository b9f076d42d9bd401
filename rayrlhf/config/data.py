"""Prompt datasets, and their conversion to tokens."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import Section


class DatasetSection(Section):
    """One prompt dataset: JSONL, Parquet, a built-in (`builtin:word-problems`), or a hub name."""

    path: str
    """File, built-in or hub name; also a folder in the hub's layout, or of `save_to_disk` of the `datasets` package."""
    split: str = "train"
    """Split of a hub dataset, or of a built-in."""
    subset: str | None = None
    """Configuration name of a hub dataset (`main` for `openai/gsm8k`)."""
    prompt_field: str = "prompt"
    """Column with the prompt: text, or a list of {role, content} messages."""
    template: str | None = None
    """Text around a standard prompt, with `{prompt}` as its place; applied before the chat template. Default: none."""
    limit: int | None = Field(None, ge=1)
    """Maximum number of rows; the first ones are used. Default: all."""

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.template is not None and "{prompt}" not in self.template:
            raise ValueError("template has no {prompt}, the place of the prompt")
        return self


class DataSection(Section):
    """Prompt data for training and for evaluation."""

    train: DatasetSection
    evaluation: DatasetSection | None = None
    """Held-out prompts, for `evaluation`. Default: none."""
    chat: bool = True
    """Wrap a standard prompt in the chat template as one user turn. A conversational prompt always uses the template."""
    system_prompt: str | None = None
    """First message of every conversation without a system message. Default: none."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Maximum tokens of a prompt; longer ones are handled by `overlong`. Default: the model's context minus
    `rollout.max_new_tokens`."""
    overlong: Literal["error", "truncate", "drop"] = "error"
    """Handling of longer prompts. `error` stops, `truncate` keeps the last tokens, `drop` omits and counts the row."""
    shuffle: bool = True
    """Shuffle the prompts each epoch, from `run.seed`. false keeps the order of the dataset."""
