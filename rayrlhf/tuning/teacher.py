"""Teacher distributions of all response tokens, computed once by the initial model.

The teacher is the initial model with a longer context. The training engine computes its distributions before the first step and
before a checkpoint is loaded; adapters are off. They are stored in `teacher/` of the run folder as arrays that every worker
maps, so a machine holds them once and a resumed run reads them.
"""

import zlib
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rayrlhf.engines.scoring.frozen import stored_signal
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.supervised_batches import HIDDEN, supervised_sequence
from rayrlhf.storage.atomic import folder_atomically, writing
from rayrlhf.tuning.held_out import shared_scores
from rayrlhf.tuning.sample_table import DistillationTable

FOLDER = "teacher"
SAMPLES_AT_ONCE = 64
"""Samples whose hidden states are in memory at a time."""


def with_teacher(
    engine: TrainEngine,
    table: DistillationTable,
    folder: Path,
    *,
    vocabulary: int | Literal["full"],
    adapters: bool,
) -> DistillationTable:
    """Return a table with the teacher's distributions, read from the run folder or computed.

    Every worker takes part.

    Args:
        engine: engine with the initial weights.
        table: the samples, the same on every worker.
        folder: the run folder, visible to all workers.
        vocabulary: "full" stores hidden states; a number stores that many most likely tokens.
        adapters: the model has adapters, which are disabled.

    Raises:
        UserError: the disk is full or not writable.
    """
    layer = engine.keep_teacher_layer()
    digest = zlib.crc32(table.teacher.token_ids.tobytes(), zlib.crc32(table.teacher.loss_mask.tobytes()))
    path = folder / FOLDER / f"{digest:08x}-{len(table)}-{vocabulary}"
    first = torch.distributed.get_rank() == 0
    found = [path.is_dir()]
    torch.distributed.broadcast_object_list(found)
    if not found[0]:
        with ExitStack() as stack:
            written = None
            if first:
                stack.enter_context(writing(path))
                written = _Arrays(stack.enter_context(folder_atomically(path, if_exists="keep")), int(table.bounds[-1]))
            for start in range(0, len(table), SAMPLES_AT_ONCE):
                samples = table.teacher.take(range(start, min(start + SAMPLES_AT_ONCE, len(table))))
                sequences = [supervised_sequence(sample) for sample in samples]
                states = shared_scores(engine, sequences, "hidden", reference=adapters)
                if written is not None:
                    targets = [state[one.loss_mask[-len(state) :]] for one, state in zip(samples, states, strict=True)]
                    hidden = np.concatenate(targets)
                    written.append({HIDDEN: hidden} if vocabulary == "full" else stored_signal(hidden, layer, vocabulary))
        torch.distributed.barrier()
    return replace(table, signal={file.stem: np.load(file, mmap_mode="r") for file in sorted(path.glob("*.npy"))})


class _Arrays:
    """Files that grow by rows, instead of arrays in memory."""

    def __init__(self, folder: Path, rows: int) -> None:
        self._folder, self._rows, self._done = folder, rows, 0
        self._files: dict[str, Any] = {}

    def append(self, parts: dict[str, np.ndarray]) -> None:
        """Write the next rows."""
        for name, part in parts.items():
            if name not in self._files:
                shape = (self._rows, *part.shape[1:])
                path = self._folder / f"{name}.npy"
                self._files[name] = np.lib.format.open_memmap(path, mode="w+", dtype=part.dtype, shape=shape)  # type: ignore[no-untyped-call]
            self._files[name][self._done : self._done + len(part)] = part
        self._done += len(part)
        if self._done == self._rows:
            for file in self._files.values():
                file.flush()
