"""Training state of one rank: backend state, step counters, moving average and random state.

It holds all that the next optimizer step depends on. `capture` copies it into memory; `write` and `save` put it on disk.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayrlhf.engines.train.backends.base import StateFiles, TrainBackend, serialized
from rayrlhf.engines.train.update import Updater
from rayrlhf.errors import UserError
from rayrlhf.storage.manifest import FileRecord, write_hashed

_AVERAGE = "average.pt"


def capture(backend: TrainBackend, updater: Updater) -> StateFiles:
    """Copy this rank's part of the state; every rank takes part.

    State that is equal on all ranks is in rank 0's part only.
    """
    counters = {"optimizer_steps": updater.optimizer_steps, "ranks": torch.distributed.get_world_size()}
    files = backend.capture_state(counters)
    average = {} if updater.average is None else {_AVERAGE: serialized(updater.average.state())}
    return files | average | {_random_name(): serialized(_random_state())}


def write(files: Mapping[str, NDArray[np.uint8]], folder: Path) -> dict[str, FileRecord]:
    """Write captured files durably; returns the record of each by its path relative to `folder`.

    Raises:
        UserError: the disk is full or not writable.
    """
    try:
        records = {}
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            records[name] = write_hashed(folder / name, content.data)
        return records
    except OSError as error:
        raise UserError(f"cannot write checkpoint {folder}: {error.strerror or error}") from error


def save(backend: TrainBackend, updater: Updater, folder: Path) -> None:
    """Write this rank's part of the state (see `TrainEngine.save_state`)."""
    write(capture(backend, updater), folder)
    torch.distributed.barrier()


def load_captured(backend: TrainBackend, updater: Updater, parts: Sequence[Mapping[str, NDArray[np.uint8]]]) -> None:
    """Restore the captured parts of all ranks.

    Raises:
        UserError: the parts are of another number of ranks.
    """
    with tempfile.TemporaryDirectory(prefix="rayrlhf-state-") as folder:
        for part in parts:
            write(part, Path(folder))
        load(backend, updater, Path(folder))


def load(backend: TrainBackend, updater: Updater, folder: Path) -> None:
    """Restore this rank's part of the state (see `TrainEngine.load_state`).

    Raises:
        UserError: the folder holds no complete state for this rank, or one of another number of ranks.
    """
    if not (folder / _random_name()).is_file():
        raise UserError(f"{folder}: no training state of rank {torch.distributed.get_rank()} in it")
    counters = backend.load_state(folder)
    ranks = torch.distributed.get_world_size()
    if counters["ranks"] != ranks:
        raise UserError(f"{folder}: the training state is of {counters['ranks']} ranks, this run has {ranks}")
    _restore(updater, counters, folder)
    state = torch.load(folder / _random_name(), weights_only=True)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def load_resized(backend: TrainBackend, updater: Updater, folder: Path) -> None:
    """Restore the state of another number of ranks; all ranks take part.

    Random states stay as they are.

    Raises:
        UserError: the folder holds no complete state, or one of another model or sharding.
    """
    _restore(updater, backend.load_resized_state(folder), folder)


def _restore(updater: Updater, counters: Mapping[str, int], folder: Path) -> None:
    """Restore the step counter, and the moving average on the rank that keeps one."""
    updater.optimizer_steps = counters["optimizer_steps"]
    if updater.average is None:
        return
    if not (folder / _AVERAGE).is_file():
        raise UserError(f"{folder}: no moving average in it, expected the state of a run with train.ema_decay")
    updater.average.load(torch.load(folder / _AVERAGE, weights_only=True, map_location="cpu"))


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _random_name() -> str:
    return f"random-{torch.distributed.get_rank():05d}.pt"
