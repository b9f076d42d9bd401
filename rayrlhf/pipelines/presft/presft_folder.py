"""Run folder of Pre-SFT, and the settings that may change in it.

A folder belongs to one configuration, but a user may stop after the scores, look at them, and then choose the cut. So a section
is fixed only once its results exist.

config.yaml, report.html, datasheet.json
intake/rows, intake/rejected       usable and unusable rows of the dataset as part files
intake/dataset.parquet             usable rows, as SFT reads them
tuned/                             SFT run on the original dataset
quality/                           responses to held-out prompts by each tuned model
round-1/scores, selection.json, relabeled, repaired, dataset.parquet, tuned/
round-2/...                        the same on the dataset of round 1
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rayrlhf.batch_inference.parts import PartFolder
from rayrlhf.config.loading.load import dump_config, stored_differences
from rayrlhf.config.pipelines import PreSFTConfig
from rayrlhf.observe.run_folder import RunFolder, open_run

REPAIRED_DATASET = "dataset.parquet"


@dataclass(frozen=True, slots=True)
class RoundFolder:
    """Results of one round."""

    path: Path

    @property
    def scores(self) -> PartFolder:
        """Pairs with probes and scores."""
        return PartFolder(self.path / "scores")

    @property
    def selection(self) -> Path:
        """The cut, and counts of selected pairs."""
        return self.path / "selection.json"

    @property
    def relabeled(self) -> PartFolder:
        """Pairs with their decisions and the provenance of each."""
        return PartFolder(self.path / "relabeled")

    @property
    def repaired(self) -> PartFolder:
        """Rows of the repaired dataset."""
        return PartFolder(self.path / "repaired")

    @property
    def dataset(self) -> Path:
        """The repaired dataset as SFT reads it."""
        return self.path / REPAIRED_DATASET


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths in the run folder."""

    path: Path

    @property
    def rows(self) -> PartFolder:
        """Usable rows of the original dataset."""
        return PartFolder(self.path / "intake" / "rows")

    @property
    def rejected(self) -> PartFolder:
        """Unusable rows, with reasons."""
        return PartFolder(self.path / "intake" / "rejected")

    @property
    def dataset(self) -> Path:
        """Usable rows of the original dataset, as SFT reads them."""
        return self.path / "intake" / REPAIRED_DATASET

    @property
    def held_out(self) -> PartFolder:
        """Held-out rows for the quality measurement."""
        return PartFolder(self.path / "quality" / "rows")

    def quality(self, label: str) -> PartFolder:
        """Responses of one tuned model to the held-out prompts."""
        return PartFolder(self.path / "quality" / label.replace("/", "-"))

    def round(self, number: int) -> RoundFolder:
        """Return the folder of a round, from 1."""
        return RoundFolder(self.path / f"round-{number}")

    def round_rows(self, number: int) -> PartFolder:
        """Return a round's input rows: the original, or the previous round's repaired ones."""
        return self.rows if number == 1 else self.round(number - 1).repaired

    def tuned(self, number: int) -> Path:
        """Return the SFT run after a round; 0 is the run on the original dataset."""
        return self.path / "tuned" if number == 0 else self.round(number).path / "tuned"

    def label(self, number: int) -> str:
        """Return the model's name in tables and reports."""
        return "tuned" if number == 0 else f"round-{number}/tuned"


FREE = ("run.rounds", "pipeline", "workers", "quality")
"""Keys and sections without effect on existing results."""
FIXED = ("pipeline.rows_per_part",)
FREE_UNTIL_RELABELED = ("select", "relabel")


def open_presft(config: PreSFTConfig) -> RunFolder:
    """Create the run folder, or resume its run with the changed settings.

    Raises:
        UserError: the folder has a run with incompatible settings or other files, or is in use by a process.
    """
    folder = config.run.folder
    free = partial(may_change, relabeled=bool(Layout(folder).round(1).relabeled.indices()))
    compare = partial(stored_differences, PreSFTConfig, may_change=free)
    return open_run(folder, dump_config(config), compare, folders=())


def may_change(key: str, *, relabeled: bool) -> bool:
    """Return True for a key that a resumed run may change.

    `relabeled` means that decisions exist.
    """
    free = FREE if relabeled else (*FREE, *FREE_UNTIL_RELABELED)
    return key not in FIXED and any(f"{key}.".startswith(f"{prefix}.") for prefix in free)
