"""Datasets that the `datasets` package reads: a hub name, a folder in the hub's layout, or what its `save_to_disk` wrote."""

from pathlib import Path
from typing import Any

from rayrlhf.config.data import DatasetSection
from rayrlhf.errors import UserError

SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Files by which a saved dataset is known, and one with splits."""


def load_table(section: DatasetSection) -> Any:
    """Return a dataset as a table of the `datasets` package, which lies in files and not in memory.

    Raises:
        UserError: unknown name, subset or split, no access, no network, or a folder of something else.
    """
    import datasets

    try:
        saved = _load_saved(section)
        return datasets.load_dataset(section.path, section.subset, split=section.split) if saved is None else saved
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        # What is wrong with a name, subset, split, access or network comes as one of these, with a message of its own.
        wanted = ", ".join(f"{key} {value}" for key, value in (("subset", section.subset), ("split", section.split)) if value)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{section.path}: cannot load it as a file, folder or hub dataset ({wanted}): {reason}") from error


def _load_saved(section: DatasetSection) -> Any:
    """Return a saved dataset; None where the path is none."""
    import datasets

    folder = Path(section.path).expanduser()
    splits = folder / SAVED_SPLITS
    if not splits.is_file() and not (folder / SAVED).is_file():
        return None
    found = datasets.load_from_disk(folder)
    if not splits.is_file():
        if section.subset is not None or section.split != "train":
            raise UserError(f"{section.path}: a saved dataset without splits; expected no subset and no split")
        return found
    if section.subset is not None or section.split not in found:
        wanted = "no subset" if section.subset is not None else f"split {' or '.join(found)}, found {section.split}"
        raise UserError(f"{section.path}: a saved dataset; expected {wanted}")
    return found[section.split]
