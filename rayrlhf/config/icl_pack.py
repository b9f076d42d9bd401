"""The root of a packing's configuration file: which documents are near each other, and how long a context is."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.icl_build import BuildPipelineSection, ExamplesSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.section import Section


class PackRunSection(Section):
    """Identity of a packing. Its folder is `root/name`."""

    name: str = Field("packed", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    root: Path = Path("runs")
    """Folder that run folders lie in."""
    seed: int = Field(0, ge=0)
    """Of the order by lot, the baseline."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.root / self.name


class DocumentsSection(Section):
    """The documents: JSONL, Parquet, a built-in, or a hub name."""

    path: str
    """Also a folder in the hub's layout, or one that `save_to_disk` of the `datasets` package wrote."""
    split: str = "train"
    """Of a hub or built-in dataset."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    text_field: str = "text"
    """A document's text."""
    limit: int | None = Field(None, ge=1)
    """Use only the first n rows."""
    max_rejected_share: float = Field(0.01, ge=0, le=1)
    """Stop when more than this share of the rows is unusable, for example empty; fewer are left out and counted."""

    def examples(self) -> ExamplesSection:
        """Return the same dataset as examples without an answer."""
        return ExamplesSection(
            path=self.path,
            split=self.split,
            subset=self.subset,
            prompt_field=self.text_field,
            response_field="",  # Whatever a document's other columns hold is no answer.
            limit=self.limit,
            max_rejected_share=self.max_rejected_share,
        )


class NeighborsSection(Section):
    """Which documents are near each other."""

    by: Literal["bm25", "nearest"] = "bm25"
    """The words that documents share, or the cosine of `encoder`'s vectors."""
    count: int = Field(10, ge=1)
    """Neighbours a document is joined to; each joins both."""
    query_words: int = Field(32, ge=1)
    """Of `bm25`: a document asks with this many of its words, the rarest, since common ones cost most and say least."""
    encoder: str | None = None
    """Of `nearest`: a folder, hub name or built-in. It reads the first 256 tokens."""
    pooling: Literal["mean", "cls"] | None = None
    """How the encoder's states become a vector; the encoder's folder says it when not given."""
    resemblance: float = Field(0.8, gt=0, le=1)
    """From this resemblance on (Jaccard index of three-word shingles) the later of two documents is left out, as a copy."""
    resembling_words: int = Field(8, ge=1)
    """Documents with fewer words are left out only if all their words are equal."""

    @model_validator(mode="after")
    def _only_vectors_need_an_encoder(self) -> Self:
        if (self.encoder is not None) != (self.by == "nearest"):
            raise ValueError("encoder and by nearest belong together: give both or neither")
        return self


class ICLPackConfig(Section):
    """Everything `rayrlhf icl pack` needs."""

    run: PackRunSection = PackRunSection()
    model: ModelSection
    """Whose tokenizer makes the tokens; no weights are loaded."""
    data: DocumentsSection
    neighbors: NeighborsSection = NeighborsSection()
    context: int = Field(2048, ge=2)
    """Tokens of a context, as long as `data.max_length` of the training that reads it. Every document ends with the
    end-of-sequence token."""
    pipeline: BuildPipelineSection = BuildPipelineSection()
