"""Share of an update that survives rounding to a lower precision."""

import json
from pathlib import Path

import torch
from torch import Tensor

from rayrlhf.storage.atomic import write_atomically
from rayrlhf.storage.notes import read_note

SHARE_FILE = "merged_adapters.json"
"""Note in a folder of merged weights: their dtype, and the share of the adapters' update that it keeps."""

PART = 2**22
"""Numbers of a weight that are compared at a time; the comparison holds five copies of them."""


class UpdateShare:
    """Projection of the rounded update of all weights on the intended one.

    With intended updates u and arrived ones a it is sum(a u) / sum(u u): 1 if everything arrives, 0 if nothing does.
    """

    def __init__(self) -> None:
        self._product = self._norm = 0.0

    def add(self, start: Tensor, intended: Tensor, arrived: Tensor) -> None:
        """Add one weight in three tensors of one shape.

        Args:
            start: before training.
            intended: after training.
            arrived: as the engine gets it.
        """
        parts = (torch.split(tensor.flatten(), PART) for tensor in (start, intended, arrived))
        for before, after, got in zip(*parts, strict=True):
            update = (after - before).float()
            # The engine's own start is the rounded one.
            received = got.float() - before.to(got.dtype).float()
            self._product += float((received * update).sum())
            self._norm += float(update.square().sum())

    @property
    def value(self) -> float | None:
        """The share; None before the first update."""
        return self._product / self._norm if self._norm else None


def write_share(folder: Path, share: float | None, dtype: torch.dtype) -> None:
    """Note in a folder of merged weights the share of the adapters' update.

    None, which nothing was rounded for, counts as all of it.
    """
    value = 1.0 if share is None else share
    write_atomically(folder / SHARE_FILE, json.dumps({"dtype": str(dtype).removeprefix("torch."), "update_arrived": value}))


def share_line(folder: Path) -> str:
    """Return a line about the share in a folder of merged weights.

    It is empty for a folder without the note.

    Raises:
        UserError: the note is damaged.
    """
    if not (folder / SHARE_FILE).is_file():
        return ""
    note = read_note(folder / SHARE_FILE)
    return f"merged in {note.get('dtype')}, which keeps {float(note.get('update_arrived', 0)):.0%} of the adapters' update"
