"""Which examples are shown beside a question, and how they are written down."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.data import DatasetSection
from rayrlhf.config.section import Section


class SelectionSection(Section):
    """Which examples are shown beside a target."""

    selection: Literal["random", "bm25", "nearest"] = "random"
    """By lot, by the words that prompts share, or by the cosine of `encoder`'s vectors."""
    order: Literal["near_to_far", "far_to_near"] = "far_to_near"
    """As shown; `far_to_near` puts the nearest beside the question."""
    encoder: str | None = None
    """Of `nearest`: a folder, hub name or built-in."""
    pooling: Literal["mean", "cls"] | None = None
    """How the encoder's states become a vector; the encoder's folder says it when not given."""
    resemblance: float = Field(0.8, gt=0, le=1)
    """From this resemblance on (Jaccard index of three-word shingles) two texts are near-duplicates, which are never shown."""
    resembling_words: int = Field(8, ge=1)
    """Texts and answers with fewer words are not compared by resemblance."""

    @model_validator(mode="after")
    def _check_encoder(self) -> Self:
        if (self.encoder is not None) != (self.selection == "nearest"):
            raise ValueError("encoder and selection nearest belong together: give both or neither")
        return self


class ContextSection(Section):
    """How demonstrations and the question are written down."""

    layout: Literal["turns", "system", "text"] = "turns"
    """A user and an assistant turn each, all in the system turn, or plain text for models without a chat template."""
    question: str = "{prompt}\n"
    """How `system` and `text` write a question; it ends where the answer begins."""
    separator: str = "\n\n"
    """What `system` and `text` put between examples."""

    @model_validator(mode="after")
    def _check_layout(self) -> Self:
        if "{prompt}" not in self.question:
            raise ValueError("question has no {prompt} in it, where the prompt goes")
        return self


class RolloutDemonstrationsSection(SelectionSection):
    """Demonstrations before every prompt while responses are sampled; never the prompt itself or its text."""

    renamed_values: ClassVar = {"train_with": {"in_context": "with_demonstrations", "bare": "without_demonstrations"}}

    count: int = Field(4, ge=1)
    """Before each prompt; what does not fit into the prompt's tokens goes from the far end, and is counted."""
    pool: DatasetSection | None = None
    """Where they come from: rows with a prompt and an answer; `data.train` when not given."""
    answer_field: str = "completion"
    """The column of the pool with the answer, as text."""
    context: ContextSection = ContextSection()
    """How they are written down; `text` where `data.chat` is false."""
    train_with: Literal["with_demonstrations", "without_demonstrations"] = "with_demonstrations"
    """Prompt that policy, reference and critic read, and that evaluations use.

    `with_demonstrations`: the same as the rollout engine. `without_demonstrations`: the prompt alone. The engine's log-probs
    then have another context, so `mismatch_alarm` is off and `algorithm.off_policy_correction` must be off. Old log-probs are
    the trainer's, and rewards judge the response to the prompt alone, in both cases.
    """
