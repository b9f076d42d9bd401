"""Process group of a role: joining and leaving a `torch.distributed` world."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch.distributed

from rayrlhf.models.sequence_parallel import RowSplit


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
    """Ranks of a world as (data_ranks, sequence parallel ranks), the latter consecutive.

    Attributes:
        data_rank: 0 .. data_ranks-1, the share of the samples that this rank's group computes.
        data_ranks: number of shares.
        row_split: columns of each row that this rank computes; None if groups have one rank.
    """

    data_rank: int
    data_ranks: int
    row_split: RowSplit | None = None


def make_grid(sequence_parallel: int) -> Grid:
    """Form the groups of `sequence_parallel` ranks that share rows.

    Every rank of the world takes part.

    Raises:
        ValueError: it does not divide the ranks.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if ranks % sequence_parallel:
        raise ValueError(f"{ranks} ranks in groups of {sequence_parallel}")
    if sequence_parallel == 1:
        return Grid(rank, ranks)
    group, _ = torch.distributed.new_subgroups(group_size=sequence_parallel, timeout=_timeout())  # type: ignore[no-untyped-call]
    return Grid(rank // sequence_parallel, ranks // sequence_parallel, RowSplit(group))


def _timeout() -> timedelta:
    """Return the joined world's timeout; new groups would have torch's default."""
    world: Any = torch.distributed.group.WORLD
    found: timedelta = world._get_backend(world._device_types[0]).options._timeout
    return found


def leave() -> None:
    """Leave the world; a no-op outside of one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
