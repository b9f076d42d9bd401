"""A role's actors as one thing: created together, called together, named in every error."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayrlhf.actors.placement import Role, Seat
from rayrlhf.actors.waiting import wait_all


@dataclass(frozen=True, slots=True)
class ActorGroup:
    """All processes of one role.

    Attributes:
        role: the role.
        names: `<run>/<role>/<rank>`, as `ray list actors` shows them.
        handles: one actor handle a rank.
    """

    role: Role
    names: tuple[str, ...]
    handles: tuple[Any, ...]

    def __len__(self) -> int:
        """Number of processes."""
        return len(self.handles)

    def call(self, method: str, *args: Any, **kwargs: Any) -> dict[str, ray.ObjectRef]:
        """Call a method on every rank with the same arguments; returns actor name -> reference without waiting."""
        return {
            name: getattr(handle, method).remote(*args, **kwargs) for name, handle in zip(self.names, self.handles, strict=True)
        }

    def call_each(self, method: str, arguments: Iterable[Sequence[Any]]) -> dict[str, ray.ObjectRef]:
        """Call a method on rank i with the i-th arguments."""
        return {
            name: getattr(handle, method).remote(*args)
            for name, handle, args in zip(self.names, self.handles, arguments, strict=True)
        }

    def all(self, method: str, *args: Any, seconds: float, **kwargs: Any) -> list[Any]:
        """Call every rank with the same arguments and wait for all answers."""
        return wait_all(self.call(method, *args, **kwargs), f"{self.role}.{method}", seconds)

    def kill(self) -> None:
        """End the processes without ceremony."""
        for handle in self.handles:
            ray.kill(handle)


def create_group(
    role: Role,
    actor_class: type,
    seats: Sequence[Seat],
    placement_groups: Mapping[str, PlacementGroup],
    run_name: str,
    environment: Mapping[str, str],
) -> ActorGroup:
    """Create a role's actors in their seats. Constructors take nothing, so that Ray can restart them anywhere."""
    names, handles = [], []
    for rank, seat in enumerate(seats):
        name = f"{run_name}/{role}/{rank}"
        strategy = PlacementGroupSchedulingStrategy(
            placement_groups[seat.group],
            placement_group_bundle_index=seat.bundles[0],
            placement_group_capture_child_tasks=len(seat.bundles) > 1,
        )
        remote = ray.remote(concurrency_groups={"health": 1})(actor_class).options(
            name=name,
            num_cpus=seat.cpus,
            num_gpus=seat.gpus,
            scheduling_strategy=strategy,
            runtime_env={"env_vars": process_environment(seat) | dict(environment)},
        )
        names.append(name)
        handles.append(remote.remote())
    return ActorGroup(role, tuple(names), tuple(handles))


def process_environment(seat: Seat) -> dict[str, str]:
    """Environment of one process: its threads, and no view of devices it was not given."""
    environment = {
        "OMP_NUM_THREADS": str(seat.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }
    if seat.gpus == 0:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment
