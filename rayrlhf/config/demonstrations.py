"""Demonstrations in a prompt: their selection and layout."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.data import DatasetSection
from rayrlhf.config.section import Section


class SelectionSection(Section):
    """Selection of the examples shown with a target."""

    selection: Literal["random", "bm25", "nearest"] = "random"
    """Ranking of the examples: `random`, `bm25` by shared words of the prompts, `nearest` by the cosine of `encoder`'s
    vectors."""
    order: Literal["near_to_far", "far_to_near"] = "far_to_near"
    """Order in the prompt; `far_to_near` puts the nearest example next to the question."""
    encoder: str | None = None
    """Encoder of `selection: nearest`: a folder, hub name or built-in."""
    pooling: Literal["mean", "cls"] | None = None
    """Pooling of the encoder's states. Default: that of the encoder's folder."""
    resemblance: float = Field(0.8, gt=0, le=1)
    """Minimum Jaccard index of three-word shingles of near-duplicates, which are never shown."""
    resembling_words: int = Field(8, ge=1)
    """Minimum words of texts and answers that are compared by resemblance."""

    @model_validator(mode="after")
    def _check_encoder(self) -> Self:
        if (self.encoder is not None) != (self.selection == "nearest"):
            raise ValueError("encoder and selection nearest belong together: set both or neither")
        return self


class ContextSection(Section):
    """Layout of demonstrations and question."""

    layout: Literal["turns", "system", "text"] = "turns"
    """`turns`: a user and an assistant turn per example. `system`: all examples in the system turn. `text`: plain text, for
    models without a chat template."""
    question: str = "{prompt}\n"
    """Format of a question under `system` and `text`, up to the start of the answer."""
    separator: str = "\n\n"
    """Text between examples under `system` and `text`."""

    @model_validator(mode="after")
    def _check_layout(self) -> Self:
        if "{prompt}" not in self.question:
            raise ValueError("question has no {prompt}, the place of the prompt")
        return self


class RolloutDemonstrationsSection(SelectionSection):
    """Demonstrations before every sampled prompt, never the prompt itself or its text."""

    renamed_values: ClassVar = {"train_with": {"in_context": "with_demonstrations", "bare": "without_demonstrations"}}

    count: int = Field(4, ge=1)
    """Demonstrations per prompt. Those that exceed the prompt's token budget are dropped from the far end and counted."""
    pool: DatasetSection | None = None
    """Dataset of the demonstrations: rows with a prompt and an answer. Default: `data.train`."""
    answer_field: str = "completion"
    """Column of the pool with the answer, as text."""
    context: ContextSection = ContextSection()
    """Layout; must be `text` if `data.chat` is false."""
    train_with: Literal["with_demonstrations", "without_demonstrations"] = "with_demonstrations"
    """Prompt that policy, reference and critic read, and that evaluations use.

    `with_demonstrations`: the same as the rollout engine. `without_demonstrations`: the prompt alone. The engine's log-probs
    then have another context, so `mismatch_alarm` is off and `algorithm.off_policy_correction` must be off. Old log-probs are
    the trainer's, and rewards judge the response to the prompt alone, in both cases.
    """
