"""Training state on disk: everything the next optimizer step depends on, and the model alone in Hugging Face form."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayrlhf.engines.update import Updater
from rayrlhf.errors import UserError
from rayrlhf.models.load import save_model_folder
from rayrlhf.models.network import Network
from rayrlhf.models.value_head import HEAD_FILE

_TAG = "state"


def save(engine: Any, updater: Updater, folder: Path) -> None:
    """Write this rank's part of the state (see `TrainEngine.save_state`)."""
    folder.mkdir(parents=True, exist_ok=True)
    counters = {"optimizer_steps": updater.optimizer_steps, "ranks": torch.distributed.get_world_size()}
    engine.save_checkpoint(
        str(folder), tag=_TAG, client_state=counters, save_latest=False, exclude_frozen_parameters=_has_frozen(engine)
    )
    torch.save(_random_state(), _random_file(folder))
    torch.distributed.barrier()


def load(engine: Any, updater: Updater, folder: Path) -> None:
    """Restore this rank's part of the state (see `TrainEngine.load_state`).

    Raises:
        UserError: the folder holds no complete state for this rank, or one of another number of ranks.
    """
    if not _random_file(folder).is_file():
        raise UserError(f"{folder}: no training state of rank {torch.distributed.get_rank()} in it")
    path, counters = engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=not _has_frozen(engine))
    if path is None:
        raise UserError(f"{folder}: no training state in it")
    ranks = torch.distributed.get_world_size()
    if counters["ranks"] != ranks:
        raise UserError(f"{folder}: the training state is of {counters['ranks']} ranks, this run has {ranks}")
    updater.optimizer_steps = counters["optimizer_steps"]
    state = torch.load(_random_file(folder), weights_only=True)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def export(network: Network, state: dict[str, Tensor], tokenizer: Any, folder: Path) -> None:
    """Write merged weights, tokenizer and value head as a Hugging Face folder, whole or not at all."""
    extra = {}
    if network.v_head is not None:
        extra[HEAD_FILE] = {f"v_head.{name}": tensor.detach().cpu() for name, tensor in network.v_head.state_dict().items()}
    save_model_folder(folder, network.model, state, tokenizer, extra)


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _random_file(folder: Path) -> Path:
    return folder / f"random-{torch.distributed.get_rank():05d}.pt"


def _has_frozen(engine: Any) -> bool:
    """With adapters the base is frozen; it is loaded from its own checkpoint and not saved again."""
    return any(not parameter.requires_grad for parameter in engine.module.parameters())
