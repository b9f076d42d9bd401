"""Training state: everything the next optimizer step depends on, in memory or on disk, and the model alone for others.

DeepSpeed writes its checkpoints through an engine that can be exchanged. The one here keeps the files in memory, so that a
rank is free again after one copy; the bytes then go to a disk in the background, or to another process.
"""

import io
import pickle
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayrlhf.engines.train.update import Updater
from rayrlhf.errors import UserError
from rayrlhf.models.load import save_model_folder
from rayrlhf.models.network import Network
from rayrlhf.models.value_head import HEAD_FILE
from rayrlhf.storage.manifest import FileRecord, write_hashed

_TAG = "state"
_AVERAGE = "average.pt"

StateFiles = dict[str, NDArray[np.uint8]]
"""One rank's part of the state: path relative to the state's folder -> content as bytes [size]."""


class _MemoryFiles:
    """The part of DeepSpeed's checkpoint engine that saving calls, writing to memory."""

    def __init__(self, root: Path) -> None:
        self.files: StateFiles = {}
        self._root = root

    def save(self, state_dict: Any, path: str) -> None:
        self.files[str(Path(path).relative_to(self._root))] = _serialized(state_dict)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing to make."""

    def create(self, info: Any) -> None:
        """Nothing to prepare."""

    def commit(self, info: Any) -> bool:
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return True


class _PlainFiles:
    """The part of DeepSpeed's checkpoint engine that loading calls, without its trust in what it reads."""

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        return load_file(Path(path))


def capture(engine: Any, updater: Updater) -> StateFiles:
    """Copy this rank's part of weights, optimizer, counters and random state; every rank takes part.

    What replicas have in common is in rank 0's part only.
    """
    root = Path("/state")
    memory = _MemoryFiles(root)
    counters = {"optimizer_steps": updater.optimizer_steps, "ranks": torch.distributed.get_world_size()}
    disk, script = engine.checkpoint_engine, engine._copy_recovery_script
    engine.checkpoint_engine = memory
    engine._copy_recovery_script = lambda _: None  # scripts for people who have DeepSpeed's files and nothing else
    try:
        engine.save_checkpoint(
            str(root), tag=_TAG, client_state=counters, save_latest=False, exclude_frozen_parameters=_has_frozen(engine)
        )
    finally:
        engine.checkpoint_engine, engine._copy_recovery_script = disk, script
    average = {} if updater.average is None else {_AVERAGE: _serialized(updater.average.state())}
    return memory.files | average | {_random_name(): _serialized(_random_state())}


def state_folder(folder: Path) -> Path:
    """Where DeepSpeed's files lie in a state's folder."""
    return folder / _TAG


def load_file(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Read one of DeepSpeed's files, tensors on the CPU; nothing in it is run.

    Args:
        path: of the file.
        mapped: leave the tensors on the disk until they are read; the file must stay for as long as they do.

    Raises:
        UserError: there is more in it than tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals(_plain_classes()):
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: not read, expected tensors and plain values only; remove this checkpoint") from error
    return content


def load_checkpoint(engine: Any, folder: Path, **options: Any) -> dict[str, Any]:
    """Let DeepSpeed load a state; returns the counters that were saved beside it.

    Raises:
        UserError: the folder holds no training state.
    """
    usual = engine.checkpoint_engine
    engine.checkpoint_engine = _PlainFiles()
    try:
        path, counters = engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=not _has_frozen(engine), **options)
    finally:
        engine.checkpoint_engine = usual
    if path is None:
        raise UserError(f"{folder}: no training state in it")
    return dict(counters)


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


def save(engine: Any, updater: Updater, folder: Path) -> None:
    """Write this rank's part of the state (see `TrainEngine.save_state`)."""
    write(capture(engine, updater), folder)
    torch.distributed.barrier()


def load_captured(engine: Any, updater: Updater, parts: Sequence[Mapping[str, NDArray[np.uint8]]]) -> None:
    """Continue from what all ranks captured.

    Raises:
        UserError: the parts are of another number of ranks.
    """
    with tempfile.TemporaryDirectory(prefix="rayrlhf-state-") as folder:
        for part in parts:
            write(part, Path(folder))
        load(engine, updater, Path(folder))


def load(engine: Any, updater: Updater, folder: Path) -> None:
    """Restore this rank's part of the state (see `TrainEngine.load_state`).

    Raises:
        UserError: the folder holds no complete state for this rank, or one of another number of ranks.
    """
    if not (folder / _random_name()).is_file():
        raise UserError(f"{folder}: no training state of rank {torch.distributed.get_rank()} in it")
    counters = load_checkpoint(engine, folder)
    ranks = torch.distributed.get_world_size()
    if counters["ranks"] != ranks:
        raise UserError(f"{folder}: the training state is of {counters['ranks']} ranks, this run has {ranks}")
    updater.optimizer_steps = counters["optimizer_steps"]
    load_average(updater, folder)
    state = torch.load(folder / _random_name(), weights_only=True)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def load_average(updater: Updater, folder: Path) -> None:
    """Restore the moving average of the weights on the rank that keeps one.

    Raises:
        UserError: the state has none.
    """
    if updater.average is None:
        return
    if not (folder / _AVERAGE).is_file():
        raise UserError(f"{folder}: no moving average in it, expected the state of a run with train.ema_decay")
    updater.average.load(torch.load(folder / _AVERAGE, weights_only=True, map_location="cpu"))


def export(network: Network, state: dict[str, Tensor], tokenizer: Any, folder: Path) -> None:
    """Write merged weights, tokenizer and value head as a Hugging Face folder, whole or not at all."""
    extra = {}
    if network.v_head is not None:
        extra[HEAD_FILE] = {f"v_head.{name}": tensor.detach().cpu() for name, tensor in network.v_head.state_dict().items()}
    save_model_folder(folder, network.model, state, tokenizer, extra)


def _plain_classes() -> list[Any]:
    """What DeepSpeed puts into its files beside tensors and plain values."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


def _serialized(value: Any) -> NDArray[np.uint8]:
    stream = io.BytesIO()
    torch.save(value, stream)
    return np.frombuffer(stream.getbuffer(), dtype=np.uint8)


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _random_name() -> str:
    return f"random-{torch.distributed.get_rank():05d}.pt"


def _has_frozen(engine: Any) -> bool:
    """With adapters the base is frozen; it is loaded from its own checkpoint and not saved again."""
    return any(not parameter.requires_grad for parameter in engine.module.parameters())
