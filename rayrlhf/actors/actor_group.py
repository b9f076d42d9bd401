"""A role's actors as one thing: created together, called together, named in every error."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ActorAlreadyExistsError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayrlhf.actors.placement import Role, WorkerPlacement
from rayrlhf.actors.waiting import wait_all
from rayrlhf.errors import ActorLostError, DeadlineError, UserError

NAME_SECONDS = 30.0
"""How long a new actor waits for the name of one that has just died."""


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

    def gone(self, seconds: float = 10.0) -> str | None:
        """The name of a rank whose process is gone, or None; each has `seconds` for a ping."""
        for name, ping in self.call("ping").items():
            try:
                wait_all({name: ping}, "ping", seconds)
            except (ActorLostError, DeadlineError):
                return name
        return None

    def wait(self, pending: Mapping[str, ray.ObjectRef], what: str, seconds: float) -> list[Any]:
        """Wait for ranks that talk to each other: when one is lost the others fail first, with errors that look like bugs.

        Raises:
            ActorLostError: a rank is gone, whichever error was seen first.
            DeadlineError: not all answered in time.
        """
        try:
            return wait_all(pending, what, seconds)
        except RayTaskError as error:
            name = self.gone()
            if name is None:
                raise
            raise ActorLostError(f"{name} was lost during {what}", name) from error

    def kill(self) -> None:
        """End the processes without ceremony."""
        for handle in self.handles:
            ray.kill(handle)

    def with_handle(self, rank: int, handle: Any) -> "ActorGroup":
        """The same group with another process at one rank."""
        return replace(self, handles=(*self.handles[:rank], handle, *self.handles[rank + 1 :]))


def create_group(
    role: Role,
    actor_class: type,
    workers: Sequence[WorkerPlacement],
    placement_groups: Mapping[str, PlacementGroup],
    run_name: str,
    environment: Mapping[str, str],
) -> ActorGroup:
    """Create a role's actors in their workers. Constructors take nothing, so that Ray can restart them anywhere."""
    names = tuple(f"{run_name}/{role}/{rank}" for rank in range(len(workers)))
    handles = [
        create_actor(name, actor_class, worker, placement_groups[worker.group], environment)
        for name, worker in zip(names, workers, strict=True)
    ]
    return ActorGroup(role, names, tuple(handles))


def create_actor(
    name: str,
    actor_class: type,
    worker: WorkerPlacement,
    placement_group: PlacementGroup,
    environment: Mapping[str, str],
) -> Any:
    """Create one actor in its worker; returns its handle without waiting for the process.

    A driver that was killed and started again may come before Ray has cleared away the actors of the one before.

    Raises:
        UserError: another run of the same name is alive on the cluster.
    """
    strategy = PlacementGroupSchedulingStrategy(
        placement_group,
        placement_group_bundle_index=worker.bundles[0],
        placement_group_capture_child_tasks=len(worker.bundles) > 1,
    )
    remote = ray.remote(concurrency_groups={"health": 1, "storage": 1})(actor_class).options(
        name=name,
        num_cpus=worker.cpus,
        num_gpus=worker.gpus,
        scheduling_strategy=strategy,
        runtime_env={"env_vars": process_environment(worker) | dict(environment)},
    )
    end = time.monotonic() + NAME_SECONDS
    while True:
        try:
            return remote.remote()
        except ActorAlreadyExistsError as error:
            if time.monotonic() > end:
                raise UserError(f"actor {name} exists: another run of this run.name is alive on the cluster") from error
            time.sleep(0.5)


def process_environment(worker: WorkerPlacement) -> dict[str, str]:
    """Environment of one process: its threads, and no view of devices it was not given."""
    environment = {
        "OMP_NUM_THREADS": str(worker.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }
    if worker.gpus == 0:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment
