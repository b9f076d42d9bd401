"""Ranks that share rows, weights or experts: what divides what, and what excludes what."""

from itertools import combinations
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rayrlhf.config.model import ModelSection
    from rayrlhf.config.train import UpdateSection


class RankGroups(Protocol):
    """Section with the sizes of groups of ranks."""

    @property
    def sequence_parallel(self) -> int:
        """Ranks that share each row."""

    @property
    def tensor_parallel(self) -> int:
        """Ranks that share each weight."""

    @property
    def expert_parallel(self) -> int:
        """Ranks that share the experts, each with samples of its own."""


def group_size(groups: RankGroups) -> int:
    """Return the number of consecutive ranks that compute the same samples."""
    return groups.sequence_parallel * groups.tensor_parallel


def weight_parts(groups: RankGroups) -> int:
    """Return the number of parts that weights, or experts, are held in."""
    return groups.tensor_parallel * groups.expert_parallel


def group_label(groups: RankGroups) -> str:
    """Return the divisor of the ranks as text; empty for groups of one."""
    sizes = {"sequence_parallel": groups.sequence_parallel, "tensor_parallel": groups.tensor_parallel}
    return "".join(f" / {name} {size}" for name, size in sizes.items() if size > 1)


def shared_parts(groups: RankGroups) -> str:
    """Return what ranks share as the end of a line; empty for groups of one."""
    sizes = {"rows": groups.sequence_parallel, "weights": groups.tensor_parallel, "experts": groups.expert_parallel}
    return "".join(f", {what} split over {size}" for what, size in sizes.items() if size > 1)


def check_groups(groups: RankGroups, fewest: int, most: int, key: str) -> None:
    """Check sizes of groups against the numbers of ranks, which `key` sets.

    Raises:
        ValueError: they do not divide the ranks, or cannot be combined.
    """
    shared = {"sequence_parallel": "rows", "tensor_parallel": "weights", "expert_parallel": "experts"}
    sizes: dict[str, int] = {name: getattr(groups, name) for name in shared}
    for one, other in combinations(sizes, 2):
        if sizes[one] > 1 and sizes[other] > 1:
            raise ValueError(
                f"{one} {sizes[one]} with {other} {sizes[other]}: ranks share {shared[one]} or {shared[other]}, not both; "
                "expected 1 for one of them"
            )
    for name, size in sizes.items():
        if size > 1 and fewest != most:
            raise ValueError(f"{name} {size} needs one number as {key}, found a range")
        if most % size:
            raise ValueError(f"{name} {size} does not divide {key} {most}")


def check_whole_rows(groups: RankGroups, key: str, model: "ModelSection", train: "UpdateSection") -> None:
    """Check that nothing needs rows that are shared.

    Raises:
        ValueError: outputs of frozen layers are cached.
    """
    size = groups.sequence_parallel
    cached = model.lora is not None and model.lora.last_layers is not None and not model.gradient_checkpointing
    if size > 1 and cached and not train.all_ranks_must_forward:
        raise ValueError(
            f"{key}.sequence_parallel {size} with model.lora.last_layers: the outputs of frozen layers are "
            "cached for whole rows; expected last_layers null, or model.gradient_checkpointing true, which caches none"
        )
