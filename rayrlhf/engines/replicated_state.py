"""Training state on another number of ranks than it was saved on: at ZeRO-0, where every rank holds the whole."""

from pathlib import Path
from typing import Any

from rayrlhf.engines.train_state import load_average
from rayrlhf.engines.update import Updater
from rayrlhf.errors import UserError

_TAG = "state"


def load_replicated(engine: Any, updater: Updater, folder: Path) -> None:
    """Restore weights, optimizer, counters and moving average from rank 0's part; random states stay as they are.

    Raises:
        UserError: the weights are sharded, so that no rank has the whole; or the folder holds no state.
    """
    stage = engine.zero_optimization_stage()
    if stage > 0:
        raise UserError(
            f"{folder}: the training state is of another number of workers, and with train.zero_stage {stage} it is sharded; "
            "expected the same workers.count, or train.zero_stage 0"
        )
    frozen = any(not parameter.requires_grad for parameter in engine.module.parameters())
    path, counters = engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=not frozen)
    if path is None:
        raise UserError(f"{folder}: no training state in it")
    updater.optimizer_steps = counters["optimizer_steps"]
    load_average(updater, folder)
