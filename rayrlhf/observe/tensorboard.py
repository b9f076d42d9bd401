"""Metrics as TensorBoard events, in `tensorboard/`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import SupportsFloat

from rayrlhf.storage.atomic import writing


class TensorBoardSink:
    """Writes scalars; TensorBoard itself is imported when the first sink is made."""

    def __init__(self, folder: Path, *, resumed_after: int | None = None) -> None:
        """Open an event file in `folder`.

        Args:
            folder: usually `run_folder/tensorboard`.
            resumed_after: last valid step of a resumed run; TensorBoard hides events of later steps.

        Raises:
            UserError: the folder cannot be written.
        """
        from torch.utils.tensorboard.writer import SummaryWriter

        self.folder = folder
        with writing(folder):
            self._writer = SummaryWriter(str(folder), purge_step=None if resumed_after is None else resumed_after + 1)

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Write one step's finite numbers and flush.

        Raises:
            UserError: the file cannot be written.
        """
        with writing(self.folder):
            for name, value in metrics.items():
                if math.isfinite(number := float(value)):
                    self._writer.add_scalar(name, number, step)
            self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()
