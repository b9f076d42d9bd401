"""Training state on another number of ranks than it was saved on.

Weights and optimizer moments belong to parameters, not to ranks, and ZeRO cuts them: at stages 1 and 2 all parameters of a
group are put in a row and the row is cut into equal pieces, at stage 3 every parameter is cut by itself; either way the last
pieces are padded. To read such a state on another number of ranks, the saved pieces are put together, the padding is left off,
and the row is cut anew. At ZeRO-0 every rank holds the whole and there is nothing to cut.

Each rank reads the files of all ranks as memory maps, and copies of them what is its own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayrlhf.engines.train.backends.deepspeed_state import load_average, load_checkpoint, load_file, state_folder
from rayrlhf.engines.train.update import Updater
from rayrlhf.errors import UserError

_WEIGHTS = "weights"
_Values = dict[str, list[Tensor]]
"""Kind ("weights", or an optimizer state's name) -> one flat tensor a group of parameters."""


def load_resized(engine: Any, updater: Updater, folder: Path) -> None:
    """Restore weights, optimizer, counters and moving average; random states stay as they are. All ranks take part.

    Raises:
        UserError: the folder holds no complete state, or one of other parameters or of another ZeRO stage.
    """
    stage = engine.zero_optimization_stage()
    model = state_folder(folder) / f"{'zero_pp_rank_0_' if stage == 3 else ''}mp_rank_00_model_states.pt"
    if not model.is_file():
        raise UserError(f"{folder}: no training state in it that was saved at train.zero_stage {stage}")
    counters = load_file(model, mapped=True)
    if stage == 0:
        load_checkpoint(engine, folder)
    else:
        saved = [_optimizer_state(folder, rank) for rank in range(counters["ranks"])]
        try:
            if stage == 3:
                _set_shards(engine, saved)
            else:
                load_checkpoint(engine, folder, load_optimizer_states=False)  # the weights are whole in rank 0's file
                _set_moments(engine, saved)
        except _OtherParametersError as error:
            raise UserError(f"{folder}: the training state is of another model: {error}") from error
    updater.optimizer_steps = counters["optimizer_steps"]
    load_average(updater, folder)


class _OtherParametersError(Exception):
    """The numbers saved are not as many as the parameters need."""


def recut_row(pieces: Sequence[Tensor], length: int, rank: int, size: int) -> Tensor:
    """Put equal pieces of a row together and cut one of another size out.

    Args:
        pieces: what each rank saved [any], in the order of ranks; together at least `length` numbers, then padding.
        length: numbers in the row.
        rank: which piece is wanted.
        size: numbers in a piece now.

    Returns:
        [size], zero where the row has ended.
    """
    row = torch.cat([piece.flatten() for piece in pieces])
    if len(row) < length:
        raise _OtherParametersError(f"{len(row)} numbers, expected {length}")
    own = row[:length][rank * size : (rank + 1) * size]
    return torch.cat([own, own.new_zeros(size - len(own))])


def recut_each(rows: Sequence[Tensor], lengths: Sequence[int], rank: int, ranks: int) -> list[Tensor]:
    """Do with each parameter what `recut_row` does with a row of them.

    Args:
        rows: what each rank saved [any]: its piece of every parameter, one after the other, each rounded up to the same size.
        lengths: numbers of each parameter.
        rank: which pieces are wanted.
        ranks: in how many pieces each parameter is cut now.

    Returns:
        The pieces of one rank, a parameter each.
    """
    sizes = [-(-length // len(rows)) for length in lengths]
    if any(len(row) != sum(sizes) for row in rows):
        raise _OtherParametersError(f"{[len(row) for row in rows]} numbers, expected {sum(sizes)} of each rank")
    split = [torch.split(row, sizes) for row in rows]
    return [
        recut_row([pieces[index] for pieces in split], length, rank, -(-length // ranks))
        for index, length in enumerate(lengths)
    ]


def _set_moments(engine: Any, saved: Sequence[Mapping[str, Any]]) -> None:
    """Cut the moments of ZeRO-1 and 2 anew."""
    wrapped, rank = engine.optimizer, torch.distributed.get_rank()
    lengths = [sum(parameter.numel() for parameter in group) for group in wrapped.bit16_groups]
    sizes = [len(piece) for piece in wrapped.single_partition_of_fp32_groups]
    states = [part["base_optimizer_state"]["state"] for part in saved]
    state: dict[int, dict[str, Any]] = {}
    for index, (length, size) in enumerate(zip(lengths, sizes, strict=True)):
        kinds = states[0].get(index, {})
        state[index] = {
            kind: recut_row([part[index][kind] for part in states], length, rank, size) if _is_cut(value) else _own(value)
            for kind, value in kinds.items()
        }
    wrapped.optimizer.load_state_dict({"state": state, "param_groups": wrapped.optimizer.state_dict()["param_groups"]})


def _set_shards(engine: Any, saved: Sequence[Mapping[str, Any]]) -> None:
    """Cut weights and moments of ZeRO-3 anew, and give them to DeepSpeed as if this rank had saved them."""
    wrapped, rank, ranks = engine.optimizer, torch.distributed.get_rank(), torch.distributed.get_world_size()
    lengths = [parameter.ds_numel for group in wrapped.fp16_groups for parameter in group]
    sizes = [len(flat) for flat in wrapped.fp32_partitioned_groups_flat]
    rows = [_rows(part) for part in saved]
    own = {
        kind: torch.split(torch.cat(recut_each([torch.cat(row[kind]) for row in rows], lengths, rank, ranks)), sizes)
        for kind in rows[0]
    }
    states = saved[0]["optimizer_state_dict"]["state"]
    whole = {} if not states else {kind: value for kind, value in states[min(states)].items() if not _is_cut(value)}
    wrapped.checkpoint_event_prologue()
    current = wrapped.state_dict()
    moments = {kind: pieces for kind, pieces in own.items() if kind != _WEIGHTS}
    current["optimizer_state_dict"]["state"] = {
        # Groups must not share a tensor: each counts its steps by itself.
        index: {kind: _own(value) for kind, value in whole.items()} | {kind: pieces[index] for kind, pieces in moments.items()}
        for index in range(len(sizes))
        if states
    }
    current["fp32_flat_groups"] = list(own[_WEIGHTS])
    wrapped.load_state_dict([current] * ranks)
    wrapped.checkpoint_event_epilogue()


def _rows(part: Mapping[str, Any]) -> _Values:
    """What one rank saved at ZeRO-3, its groups in their order."""
    states = part["optimizer_state_dict"]["state"]
    kinds = [kind for kind, value in states[min(states)].items() if _is_cut(value)] if states else []
    return {_WEIGHTS: part["fp32_flat_groups"]} | {kind: [states[i][kind] for i in sorted(states)] for kind in kinds}


def _is_cut(value: Any) -> bool:
    """Whether an optimizer's state belongs to single numbers of the parameters, and not to the step."""
    return isinstance(value, Tensor) and value.ndim > 0


def _own(value: Any) -> Any:
    """A copy that does not lean on a file."""
    return value.clone() if isinstance(value, Tensor) else value


def _optimizer_state(folder: Path, rank: int) -> dict[str, Any]:
    path = state_folder(folder) / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    if not path.is_file():
        raise UserError(f"{folder}: no training state of rank {rank} in it")
    state: dict[str, Any] = load_file(path, mapped=True)["optimizer_state_dict"]
    return state
