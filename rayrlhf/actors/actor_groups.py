"""All actors of a run: placed, started side by side, and ended together."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from rayrlhf.actors.actor_group import ActorGroup, create_actor, create_group
from rayrlhf.actors.placement import (
    ClusterResources,
    GroupPlan,
    ResourcePlan,
    Role,
    WorkerPlacement,
    building_order,
    replica_group,
)
from rayrlhf.actors.reference_actor import ReferenceActor
from rayrlhf.actors.reward_actor import RewardActor
from rayrlhf.actors.role_specs import RoleSpecs
from rayrlhf.actors.rollout_actor import RolloutActor
from rayrlhf.actors.train_actor import CriticActor, PolicyActor, TrainActor
from rayrlhf.actors.waiting import wait_all
from rayrlhf.engines.train.process_group import ProcessGroupSpec
from rayrlhf.errors import ActorLostError, DeadlineError, UserError

ACTOR_CLASSES: Mapping[Role, type] = {
    "policy": PolicyActor,
    "critic": CriticActor,
    "reference": ReferenceActor,
    "reward": RewardActor,
    "rollout": RolloutActor,
}


@dataclass(frozen=True, slots=True)
class ActorGroups:
    """The actors of a run by role; a role the objective does not need is absent. They are there, but empty until `build`.

    Attributes:
        groups: the actors that are there now; `restart` exchanges some.
        plan: where everybody sat at first.
        workers: where everybody sits now.
        specs: what everybody is built from.
        run_name: first part of every actor's name.
        placed: placement groups by name.
    """

    groups: dict[Role, ActorGroup]
    plan: ResourcePlan
    workers: dict[Role, tuple[WorkerPlacement, ...]]
    specs: RoleSpecs
    run_name: str
    placed: dict[str, PlacementGroup]

    def __getitem__(self, role: Role) -> ActorGroup:
        """The actors of one role."""
        return self.groups[role]

    def __contains__(self, role: Role) -> bool:
        """Whether the role was started."""
        return role in self.groups

    def build(self, seconds: float) -> None:
        """Load all models, side by side as far as `building_order` lets them.

        Loading is mostly reading and importing, so it overlaps well even on two cores.

        Raises:
            UserError: a role refuses its spec.
            DeadlineError: a role was not ready in time.
        """
        for roles in building_order({role: self.workers[role] for role in self.groups}):
            calls: dict[str, ray.ObjectRef] = {}
            for role in roles:
                calls |= self.start_building(role, seconds)
            try:
                wait_all(calls, "start", seconds)
            except DeadlineError as error:
                raise DeadlineError(f"{error}; is the model still downloading, or the machine short of memory?") from error

    def start_building(self, role: Role, seconds: float) -> dict[str, ray.ObjectRef]:
        """Let a role load its models; a role that learns first agrees on a meeting point, within `seconds`."""
        group = self.groups[role]
        if issubclass(ACTOR_CLASSES[role], TrainActor):
            members = _process_groups(group, self.specs.backend(role), seconds)
            return group.call_each("build", [(member, self.specs.train(role)) for member in members])
        return group.call("build", *self.specs.arguments(role))

    def restart(self, role: Role, rank: int) -> ray.ObjectRef:
        """Put a new process at one rank of a role that does not learn; returns its `build`, without waiting."""
        self._exchange(role, rank)
        return self.groups[role].handles[rank].build.remote(*self.specs.arguments(role))

    def restart_gang(self, role: Role, seconds: float) -> None:
        """Put new processes at all ranks of a role that learns: a process group cannot lose a member and go on.

        Raises:
            ActorLostError: a new process died as well.
            DeadlineError: they were not ready in time.
        """
        for rank in range(len(self.groups[role])):
            self._exchange(role, rank)
        wait_all(self.start_building(role, seconds), f"rebuilding the {role}", seconds)

    def _exchange(self, role: Role, rank: int) -> None:
        group = self.groups[role]
        ray.kill(group.handles[rank])
        self.groups[role] = group.with_handle(rank, self._create(role, group.names[rank], self.workers[role][rank]))

    def request_placement_group(self, name: str) -> PlacementGroup:
        """Ask the cluster for the room of one more rollout replica, under a name; nothing waits for it."""
        group = replica_group(self.plan)
        self.placed[name] = _create_placement_group(group)
        return self.placed[name]

    def release_placement_group(self, name: str) -> None:
        """Return a room, or withdraw a request for one."""
        remove_placement_group(self.placed.pop(name))

    def add_replica(self, room: str) -> ray.ObjectRef:
        """Put one more rollout replica into a room that was granted; returns its `build`, without waiting."""
        group, first = self.groups["rollout"], self.plan.workers["rollout"][0]
        worker = replace(first, group=room, bundles=tuple(range(len(first.bundles))))
        name = f"{self.run_name}/rollout/{len(group)}"
        handle = self._create("rollout", name, worker)
        self.workers["rollout"] = (*self.workers["rollout"], worker)
        self.groups["rollout"] = replace(group, names=(*group.names, name), handles=(*group.handles, handle))
        return handle.build.remote(*self.specs.arguments("rollout"))

    def remove_replica(self) -> None:
        """End the rollout replica of the highest rank, and return its room if it had one of its own."""
        group, worker = self.groups["rollout"], self.workers["rollout"][-1]
        ray.kill(group.handles[-1])
        self.groups["rollout"] = replace(group, names=group.names[:-1], handles=group.handles[:-1])
        self.workers["rollout"] = self.workers["rollout"][:-1]
        if not any(worker.group == other.group for workers in self.workers.values() for other in workers):
            self.release_placement_group(worker.group)

    def _create(self, role: Role, name: str, worker: WorkerPlacement) -> Any:
        return create_actor(name, ACTOR_CLASSES[role], worker, self.placed[worker.group], self.specs.environment(role))


def read_cluster_resources() -> ClusterResources:
    """What the connected cluster offers, live nodes only."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return ClusterResources(tuple(node.get("CPU", 0.0) for node in nodes), tuple(node.get("GPU", 0.0) for node in nodes))


@contextmanager
def started_actor_groups(run_name: str, specs: RoleSpecs, placement_seconds: float) -> Iterator[ActorGroups]:
    """Start a process for every worker and end them all on the way out, whatever happened in between.

    The processes import what they will need on their own time; `ActorGroups.build` gives them their models.

    Raises:
        UserError: the cluster cannot worker a placement group in time.
    """
    plan = specs.plan
    placement_groups: dict[str, PlacementGroup] = {}
    groups: dict[Role, ActorGroup] = {}
    try:
        for name, group in plan.groups.items():
            placement_groups[name] = _create_placement_group(group)
        _await_placement(placement_groups, plan, placement_seconds)
        for role, workers in plan.workers.items():
            environment = specs.environment(role)
            groups[role] = create_group(role, ACTOR_CLASSES[role], workers, placement_groups, run_name, environment)
            groups[role].call("preload")
        yield ActorGroups(groups, plan, dict(plan.workers), specs, run_name, placement_groups)
        _close(groups)
    finally:
        for actors in groups.values():
            actors.kill()
        for placed in placement_groups.values():
            remove_placement_group(placed)


def _create_placement_group(group: GroupPlan) -> PlacementGroup:
    labels = [dict(group.labels)] * len(group.bundles) if group.labels else None
    return placement_group([dict(bundle) for bundle in group.bundles], group.strategy, bundle_label_selector=labels)


def _await_placement(placed: Mapping[str, PlacementGroup], plan: ResourcePlan, seconds: float) -> None:
    end = time.monotonic() + seconds
    for name, group in placed.items():
        if not group.wait(max(end - time.monotonic(), 0.01)):
            asked = [dict(bundle) for bundle in plan.groups[name].bundles]
            available = {key: value for key, value in ray.available_resources().items() if key in ("CPU", "GPU")}
            raise UserError(
                f"placement group {name!r}: asked for bundles {asked} ({_terms(plan.groups[name])}), "
                f"not granted within {seconds:.0f} s; free in the cluster now: {available}"
            )


def _terms(group: GroupPlan) -> str:
    labels = ", ".join(f"{key}={value}" for key, value in group.labels.items())
    return f"{group.strategy}, on nodes labelled {labels}" if labels else group.strategy


def _process_groups(group: ActorGroup, backend: Literal["gloo", "nccl"], seconds: float) -> list[ProcessGroupSpec]:
    """Ranks, world size and meeting point of a role's process group."""
    address, port = wait_all({group.names[0]: group.handles[0].rendezvous.remote()}, "rendezvous", seconds)[0]
    return [ProcessGroupSpec(rank, len(group), address, port, backend) for rank in range(len(group))]


def _close(groups: Mapping[Role, ActorGroup]) -> None:
    """Let engines free what they hold outside their process; bounded, since killing follows anyway."""
    if "rollout" in groups:
        with suppress(ActorLostError, DeadlineError):
            groups["rollout"].all("close", seconds=30)
