"""Base class of the actor groups, and the creation of single actors."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Concatenate, Generic, ParamSpec, TypeVar

import ray
from ray.exceptions import ActorAlreadyExistsError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayrlhf.actors.placement import Role, WorkerPlacement
from rayrlhf.actors.remote import Handle, PendingCalls, Ref, remote_call
from rayrlhf.actors.waiting import wait_all
from rayrlhf.actors.worker import Worker
from rayrlhf.errors import ActorLostError, DeadlineError, UserError

NAME_SECONDS = 30.0
"""Maximum wait for the name of an actor that has just died."""

Actor = TypeVar("Actor", bound=Worker)
Actor_co = TypeVar("Actor_co", bound=Worker, covariant=True)
Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class ActorGroup(Generic[Actor_co]):
    """All processes of one role.

    Attributes:
        names: `<run>/<role>/<rank>`, as `ray list actors` shows them.
        handles: one actor handle per rank.
    """

    role: Role
    names: tuple[str, ...]
    handles: tuple[Handle[Actor_co], ...]

    def __len__(self) -> int:
        """Return the number of processes."""
        return len(self.handles)

    def call(
        self,
        method: Callable[Concatenate[Actor_co, Arguments], Value],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> PendingCalls[Value]:
        """Call a method on every rank with the same arguments, without waiting."""
        return {
            name: remote_call(handle, method, *args, **kwargs) for name, handle in zip(self.names, self.handles, strict=True)
        }

    def call_rank(
        self,
        rank: int,
        method: Callable[Concatenate[Actor_co, Arguments], Value],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Ref[Value]:
        """Call a method on one rank, without waiting."""
        return remote_call(self.handles[rank], method, *args, **kwargs)

    def find_lost(self, seconds: float = 10.0) -> str | None:
        """Return the name of a rank whose process is gone, or None.

        Args:
            seconds: deadline of each ping.
        """
        for name, ping in self.call(Worker.ping).items():
            try:
                wait_all({name: ping}, "ping", seconds)
            except (ActorLostError, DeadlineError):
                return name
        return None

    def wait(self, pending: Mapping[str, Ref[Value]], what: str, seconds: float) -> list[Value]:
        """Wait for ranks that communicate with each other; returns their results in order.

        When one rank is lost, the others fail first, with errors that look like bugs.

        Raises:
            ActorLostError: a rank is gone, whichever error was seen first.
            DeadlineError: a rank did not respond in time.
        """
        try:
            return wait_all(pending, what, seconds)
        except RayTaskError as error:
            name = self.find_lost()
            if name is None:
                raise
            raise ActorLostError(f"{name} was lost during {what}", name) from error

    def kill(self) -> None:
        """Kill all processes."""
        for handle in self.handles:
            ray.kill(handle)


def create_actor(
    name: str,
    actor_class: type[Actor],
    worker: WorkerPlacement,
    placement_group: PlacementGroup,
    environment: Mapping[str, str],
) -> Handle[Actor]:
    """Create one actor at its placement; returns its handle without waiting for the process.

    Constructors take no arguments, so that Ray can restart an actor anywhere. A driver that was killed and restarted may come
    before Ray has removed the actors of the previous one.

    Raises:
        UserError: another run of the same name is alive on the cluster.
    """
    strategy = PlacementGroupSchedulingStrategy(
        placement_group, placement_group_bundle_index=worker.bundles[0], placement_group_capture_child_tasks=False
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
            handle: Handle[Actor] = remote.remote()
            return handle
        except ActorAlreadyExistsError as error:
            if time.monotonic() > end:
                raise UserError(f"actor {name} exists: another run of this run.name is alive on the cluster") from error
            time.sleep(0.5)


def process_environment(worker: WorkerPlacement) -> dict[str, str]:
    """Return the environment variables of one process; GPUs are hidden unless it has some."""
    environment = {
        "OMP_NUM_THREADS": str(worker.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }
    if worker.gpus == 0:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment
