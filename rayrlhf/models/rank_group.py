"""Group of ranks that compute one network together."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RankGroup:
    """Consecutive ranks of a world.

    Attributes:
        size: number of ranks.
        rank: index of this rank in the group.
    """

    def __init__(self, group: "ProcessGroup") -> None:
        self.group = group
        self.size, self.rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)

    def agree(self, verdict: bool, device: torch.device) -> bool:
        """Return True if the verdict of every rank is True."""
        every = torch.tensor(int(verdict), device=device)
        torch.distributed.all_reduce(every, torch.distributed.ReduceOp.MIN, group=self.group)
        return bool(every)
