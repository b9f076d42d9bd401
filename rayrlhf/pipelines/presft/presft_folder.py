"""The run folder of Pre-SFT, and which settings may still change in it.

A folder belongs to one configuration, but a user is meant to stop after the scores, look at them, and then choose the cut. So a
section is fixed only once something has been made with it.

What lies where in a Pre-SFT run folder.

config.yaml, report.html, datasheet.json
intake/rows, intake/rejected       the dataset as part files, and what is unusable of it
intake/dataset.parquet             the usable rows, as SFT reads them
tuned/                             the SFT run on the original dataset
quality/                           answers to held-out prompts by each tuned model
round-1/scores, selection.json, relabeled, repaired, dataset.parquet, tuned/
round-2/...                        the same on the dataset of round 1
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rayrlhf.batch_inference.parts import PartFolder
from rayrlhf.config.loading.load import dump_config, stored_differences
from rayrlhf.config.presft import PreSFTConfig
from rayrlhf.observe.run_folder import RunFolder, open_run

REPAIRED_DATASET = "dataset.parquet"


@dataclass(frozen=True, slots=True)
class RoundFolder:
    """The results of one round."""

    path: Path

    @property
    def scores(self) -> PartFolder:
        """Every pair with its probes and scores."""
        return PartFolder(self.path / "scores")

    @property
    def selection(self) -> Path:
        """The cut, and what it selects."""
        return self.path / "selection.json"

    @property
    def relabeled(self) -> PartFolder:
        """Every pair with its decision and all that led to it: the provenance."""
        return PartFolder(self.path / "relabeled")

    @property
    def repaired(self) -> PartFolder:
        """The rows of the repaired dataset."""
        return PartFolder(self.path / "repaired")

    @property
    def dataset(self) -> Path:
        """The repaired dataset as SFT reads it."""
        return self.path / REPAIRED_DATASET


@dataclass(frozen=True, slots=True)
class Layout:
    """The run folder."""

    path: Path

    @property
    def rows(self) -> PartFolder:
        """The usable rows of the original dataset."""
        return PartFolder(self.path / "intake" / "rows")

    @property
    def rejected(self) -> PartFolder:
        """The unusable rows, with reasons."""
        return PartFolder(self.path / "intake" / "rejected")

    @property
    def dataset(self) -> Path:
        """The original dataset, usable rows only, as SFT reads it."""
        return self.path / "intake" / REPAIRED_DATASET

    @property
    def held_out(self) -> PartFolder:
        """The rows that quality is measured on."""
        return PartFolder(self.path / "quality" / "rows")

    def quality(self, label: str) -> PartFolder:
        """The answers of one tuned model to the held-out prompts."""
        return PartFolder(self.path / "quality" / label.replace("/", "-"))

    def round(self, number: int) -> RoundFolder:
        """The results of one round, from 1."""
        return RoundFolder(self.path / f"round-{number}")

    def round_rows(self, number: int) -> PartFolder:
        """The rows that a round reads: the original dataset, or the one of the round before."""
        return self.rows if number == 1 else self.round(number - 1).repaired

    def tuned(self, number: int) -> Path:
        """The SFT run after a round; 0 is the one on the original dataset."""
        return self.path / "tuned" if number == 0 else self.round(number).path / "tuned"

    def label(self, number: int) -> str:
        """The name of that model in tables and reports."""
        return "tuned" if number == 0 else f"round-{number}/tuned"


FREE = ("run.rounds", "pipeline", "workers", "quality")
"""Keys and sections that change nothing of what was made."""
FIXED_ANYWAY = ("pipeline.rows_per_part",)
FREE_UNTIL_RELABELED = ("select", "relabel")


def open_presft(config: PreSFTConfig) -> RunFolder:
    """Create the run folder, or take up the run in it with the settings that may change.

    Raises:
        UserError: it holds a run with other settings that matter, no run but other files, or a process is running in it.
    """
    folder = config.run.folder
    free = partial(may_change, relabeled=bool(Layout(folder).round(1).relabeled.indices()))
    compare = partial(stored_differences, PreSFTConfig, may_change=free)
    return open_run(folder, dump_config(config), compare, folders=())


def may_change(key: str, *, relabeled: bool) -> bool:
    """Whether a setting of a run that has begun may change; `relabeled` says that decisions were made."""
    free = FREE if relabeled else (*FREE, *FREE_UNTIL_RELABELED)
    return key not in FIXED_ANYWAY and any(f"{key}.".startswith(f"{prefix}.") for prefix in free)
