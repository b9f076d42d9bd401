"""Training state of the DeepSpeed backend, in memory and in files.

DeepSpeed writes checkpoints through an exchangeable engine. The one here keeps the files in memory, so that a rank continues
after one copy; the bytes then go to disk in the background, or to another process.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rayrlhf.engines.train.backends.base import StateFiles, serialized
from rayrlhf.errors import UserError
from rayrlhf.library_types import DeepSpeedEngine

_TAG = "state"


class _MemoryFiles:
    """Members of DeepSpeed's checkpoint engine that saving uses, writing to memory."""

    def __init__(self, root: Path) -> None:
        self.files: StateFiles = {}
        self._root = root

    def save(self, state_dict: object, path: str) -> None:
        self.files[str(Path(path).relative_to(self._root))] = serialized(state_dict)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing: memory has no folders."""

    def create(self, info: object) -> None:
        """Do nothing: there is nothing to prepare."""

    def commit(self, info: object) -> bool:
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return True


class _PlainFiles:
    """Members of DeepSpeed's checkpoint engine that loading uses.

    DeepSpeed's own engine runs pickled code; this one refuses it.
    """

    def load(self, path: str, map_location: object = None) -> dict[str, Any]:
        return load_file(Path(path))


def capture(engine: DeepSpeedEngine, counters: Mapping[str, int]) -> StateFiles:
    """Copy this rank's part of weights, optimizer state and counters; every rank takes part.

    State that is equal on all ranks is in rank 0's part only.
    """
    root = Path("/state")
    memory = _MemoryFiles(root)
    disk, script = engine.checkpoint_engine, engine._copy_recovery_script
    engine.checkpoint_engine = memory
    engine._copy_recovery_script = lambda _: None  # converts DeepSpeed's files without this package
    try:
        engine.save_checkpoint(
            str(root), tag=_TAG, client_state=dict(counters), save_latest=False, exclude_frozen_parameters=_has_frozen(engine)
        )
    finally:
        engine.checkpoint_engine, engine._copy_recovery_script = disk, script
    return memory.files


def state_folder(folder: Path) -> Path:
    """Return the subfolder with DeepSpeed's files."""
    return folder / _TAG


def load_file(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Read one of DeepSpeed's files, tensors on the CPU, without running pickled code.

    Args:
        mapped: leave tensors on disk until they are read; the file must exist for as long as they do.

    Raises:
        UserError: the file holds more than tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals(_plain_classes()):
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: not read, expected tensors and plain values only; remove this checkpoint") from error
    return content


def load_checkpoint(engine: DeepSpeedEngine, folder: Path, **options: object) -> dict[str, Any]:
    """Load a state through DeepSpeed; returns the counters saved with it.

    Raises:
        UserError: the folder holds no training state, or one with weights in other parts.
    """
    check_parts(engine, folder)
    usual = engine.checkpoint_engine
    engine.checkpoint_engine = _PlainFiles()
    try:
        path, counters = engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=not _has_frozen(engine), **options)
    finally:
        engine.checkpoint_engine = usual
    if path is None:
        raise UserError(f"{folder}: no training state in it")
    return dict(counters)


def check_parts(engine: DeepSpeedEngine, folder: Path) -> None:
    """Check that a state's weights are cut as the engine's are.

    Raises:
        UserError: another number of ranks shares them.
    """
    saved = {path.name.split("mp_rank_")[1][:2] for path in state_folder(folder).glob("*mp_rank_*_model_states.pt")}
    size, key = 1, "tensor_parallel or expert_parallel"
    if engine.mpu is not None:
        size, key = engine.mpu.get_model_parallel_world_size(), engine.mpu.key
    if saved and len(saved) != size:
        raise UserError(f"{folder}: the training state is of {key} {len(saved)}, this run has {size}; expected the same")


def _plain_classes() -> list[Any]:
    """Classes in DeepSpeed's files in addition to tensors and plain values."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


def _has_frozen(engine: DeepSpeedEngine) -> bool:
    """Return True with adapters.

    The frozen base is loaded from its own checkpoint and not saved again.
    """
    return any(not parameter.requires_grad for parameter in engine.module.parameters())
