"""Process group of a role: joining and leaving a `torch.distributed` world."""

import math
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch.distributed

from rayrlhf.models.expert_parallel import ExpertSplit
from rayrlhf.models.sequence_parallel import RowSplit
from rayrlhf.models.tensor_parallel import WeightSplit


@dataclass(frozen=True, slots=True)
class ProcessGroupSpec:
    """Membership of one process in its role's world.

    Attributes:
        rank: 0 .. world_size-1.
        world_size: processes of the role.
        master_address: host of rank 0.
        master_port: a free port there.
        backend: `nccl` on GPUs, `gloo` on CPUs.
        timeout_seconds: maximum wait for another rank in any collective call, including joining.
    """

    rank: int
    world_size: int
    master_address: str
    master_port: int
    backend: Literal["gloo", "nccl"] = "gloo"
    timeout_seconds: float = 1800.0


def join(spec: ProcessGroupSpec) -> None:
    """Join the world; returns when every rank has joined.

    Raises:
        torch.distributed.DistStoreError: the ranks did not meet in time.
        ValueError: this process is in a world already.
    """
    if torch.distributed.is_initialized():
        raise ValueError("this process has joined a process group already")
    # DeepSpeed reads rank and world size from the environment, as launchers set them.
    os.environ.update(
        RANK=str(spec.rank),
        LOCAL_RANK="0",
        WORLD_SIZE=str(spec.world_size),
        MASTER_ADDR=spec.master_address,
        MASTER_PORT=str(spec.master_port),
    )
    host = f"[{spec.master_address}]" if ":" in spec.master_address else spec.master_address
    torch.distributed.init_process_group(
        spec.backend,
        init_method=f"tcp://{host}:{spec.master_port}",
        rank=spec.rank,
        world_size=spec.world_size,
        timeout=timedelta(seconds=spec.timeout_seconds),
    )


def join_alone(backend: Literal["gloo", "nccl"] = "gloo") -> None:
    """Join a world of this process alone; a no-op inside of a world."""
    if torch.distributed.is_initialized():
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    join(ProcessGroupSpec(0, 1, "127.0.0.1", port, backend))


@dataclass(frozen=True, slots=True)
class Grid:
    """Ranks of a world as (data_ranks, ranks of a group), the latter consecutive.

    The ranks of a group share rows (sequence parallelism) or weights (tensor parallelism). Those that share experts (expert
    parallelism) have samples of their own, and count as groups of one.

    Attributes:
        data_rank: 0 .. data_ranks-1, the share of the samples that this rank's group computes.
        data_ranks: number of shares.
        row_split: columns of each row that this rank computes; None if it computes whole rows.
        weight_split: part of each weight that this rank holds; None if it holds them whole.
    """

    data_rank: int
    data_ranks: int
    row_split: RowSplit | None = None
    weight_split: WeightSplit | None = None


def make_grid(sequence_parallel: int, tensor_parallel: int = 1, expert_parallel: int = 1) -> Grid:
    """Form the groups of ranks that share rows, weights, or experts.

    Every rank of the world takes part.

    Args:
        sequence_parallel: ranks that share rows.
        tensor_parallel: ranks that share weights.
        expert_parallel: ranks that share experts; two of the three must be 1.

    Raises:
        ValueError: two are more, or the ranks cannot be divided.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    size = max(sizes := (sequence_parallel, tensor_parallel, expert_parallel))
    if ranks % size or size != math.prod(sizes):
        raise ValueError(f"{ranks} ranks in groups of {' x '.join(map(str, sizes))}")
    if size == 1:
        return Grid(rank, ranks)
    timeout = _timeout()
    group, _ = torch.distributed.new_subgroups(group_size=size, timeout=timeout)  # type: ignore[no-untyped-call]
    share, shares = rank // size, ranks // size
    if sequence_parallel > 1:
        return Grid(share, shares, RowSplit(group))
    alike = [list(range(first, ranks, size)) for first in range(size)]
    data, _ = torch.distributed.new_subgroups_by_enumeration(alike, timeout=timeout)  # type: ignore[no-untyped-call]
    if expert_parallel > 1:
        return Grid(rank, ranks, weight_split=ExpertSplit(group, data))
    return Grid(share, shares, weight_split=WeightSplit(group, data))


def _timeout() -> timedelta:
    """Return the joined world's timeout; new groups would have torch's default."""
    world: Any = torch.distributed.group.WORLD
    found: timedelta = world._get_backend(world._device_types[0]).options._timeout
    return found


def leave() -> None:
    """Leave the world; a no-op outside of one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
