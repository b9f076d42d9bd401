"""Loading of a DeepSpeed training state on another number of ranks.

ZeRO divides weights and optimizer moments among the ranks. Stages 1 and 2 concatenate all parameters of a group into one row
and cut the row into equal pieces; stage 3 cuts every parameter by itself. The last pieces are padded. To load on another
number of ranks, the saved pieces are joined, the padding is dropped, and the row is cut again. At ZeRO-0 every rank holds
everything and nothing is cut.

Each rank memory-maps the files of all ranks and copies its own part.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayrlhf.engines.train.backends.deepspeed_state import check_parts, load_checkpoint, load_file, state_folder
from rayrlhf.errors import UserError
from rayrlhf.library_types import DeepSpeedEngine

_WEIGHTS = "weights"
_Values = dict[str, list[Tensor]]
"""Kind ("weights", or an optimizer state's name) -> one flat tensor per parameter group."""


def load_resized(engine: DeepSpeedEngine, folder: Path) -> Mapping[str, int]:
    """Restore weights and optimizer state; returns the counters saved with them. All ranks take part.

    Raises:
        UserError: the folder holds no complete state, or one of other parameters or of another ZeRO stage, or ranks share
            weights.
    """
    check_parts(engine, folder)
    if engine.mpu is not None:
        raise UserError(f"{folder}: the training state is of another number of ranks; expected the same with {engine.mpu.key}")
    stage = engine.zero_optimization_stage()
    model = state_folder(folder) / f"{'zero_pp_rank_0_' if stage == 3 else ''}mp_rank_00_model_states.pt"
    if not model.is_file():
        raise UserError(f"{folder}: no training state in it that was saved at train.zero_stage {stage}")
    counters = load_file(model, mapped=True)
    if stage == 0:
        load_checkpoint(engine, folder)
        return counters
    saved = [_optimizer_state(folder, rank) for rank in range(counters["ranks"])]
    try:
        if stage == 3:
            _set_shards(engine, saved)
        else:
            load_checkpoint(engine, folder, load_optimizer_states=False)  # rank 0's file has whole weights
            _set_moments(engine, saved)
    except _OtherParametersError as error:
        raise UserError(f"{folder}: the training state is of another model: {error}") from error
    return counters


class _OtherParametersError(Exception):
    """The saved state has other sizes than the parameters."""


def recut_row(pieces: Sequence[Tensor], length: int, rank: int, size: int) -> Tensor:
    """Join the equal pieces of a row and cut out one piece of another size.

    Args:
        pieces: saved piece of each rank [any], in rank order; together at least `length` numbers, then padding.
        rank: index of the piece to return.

    Returns:
        [size], zero after the end of the row.
    """
    row = torch.cat([piece.flatten() for piece in pieces])
    if len(row) < length:
        raise _OtherParametersError(f"{len(row)} numbers, expected {length}")
    own = row[:length][rank * size : (rank + 1) * size]
    return torch.cat([own, own.new_zeros(size - len(own))])


def recut_each(rows: Sequence[Tensor], lengths: Sequence[int], rank: int, ranks: int) -> list[Tensor]:
    """Apply `recut_row` to each parameter by itself.

    Args:
        rows: saved row of each rank [any]: its piece of every parameter in turn, each rounded up to the same size.
        rank: index of the pieces to return.
        ranks: number of pieces per parameter now.

    Returns:
        One piece per parameter.
    """
    sizes = [-(-length // len(rows)) for length in lengths]
    if any(len(row) != sum(sizes) for row in rows):
        raise _OtherParametersError(f"{[len(row) for row in rows]} numbers, expected {sum(sizes)} of each rank")
    split = [torch.split(row, sizes) for row in rows]
    return [
        recut_row([pieces[index] for pieces in split], length, rank, -(-length // ranks))
        for index, length in enumerate(lengths)
    ]


def _set_moments(engine: DeepSpeedEngine, saved: Sequence[Mapping[str, Any]]) -> None:
    """Cut the moments of ZeRO-1 and 2 for the present number of ranks."""
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


def _set_shards(engine: DeepSpeedEngine, saved: Sequence[Mapping[str, Any]]) -> None:
    """Cut and load weights and moments of ZeRO-3, as if this rank had saved them."""
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
        # Groups must not share a tensor: each has its own step counter.
        index: {kind: _own(value) for kind, value in whole.items()} | {kind: pieces[index] for kind, pieces in moments.items()}
        for index in range(len(sizes))
        if states
    }
    current["fp32_flat_groups"] = list(own[_WEIGHTS])
    wrapped.load_state_dict([current] * ranks)
    wrapped.checkpoint_event_epilogue()


def _rows(part: Mapping[str, Any]) -> _Values:
    """Return the ZeRO-3 state of one rank by kind, groups in order."""
    states = part["optimizer_state_dict"]["state"]
    kinds = [kind for kind, value in states[min(states)].items() if _is_cut(value)] if states else []
    return {_WEIGHTS: part["fp32_flat_groups"]} | {kind: [states[i][kind] for i in sorted(states)] for kind in kinds}


def _is_cut(value: object) -> bool:
    """Return True for optimizer state per parameter element, False for state per step."""
    return isinstance(value, Tensor) and value.ndim > 0


def _own(value: object) -> Any:
    """Return a copy that does not depend on a memory-mapped file."""
    return value.clone() if isinstance(value, Tensor) else value


def _optimizer_state(folder: Path, rank: int) -> dict[str, Any]:
    path = state_folder(folder) / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    if not path.is_file():
        raise UserError(f"{folder}: no training state of rank {rank} in it")
    state: dict[str, Any] = load_file(path, mapped=True)["optimizer_state_dict"]
    return state
