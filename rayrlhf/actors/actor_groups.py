"""All actors of a run: placed, started in parallel and ended together."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Literal, overload

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from rayrlhf.actors.actor_group import ActorGroup, create_actor
from rayrlhf.actors.placement import (
    ClusterResources,
    ForwardRole,
    GroupPlan,
    ResourcePlan,
    Role,
    StatelessRole,
    TrainRole,
    WorkerPlacement,
    replica_group,
)
from rayrlhf.actors.remote import Handle, PendingCalls, Ref
from rayrlhf.actors.role_groups import (
    GROUP_CLASSES,
    CriticGroup,
    PolicyGroup,
    ReferenceGroup,
    RewardGroup,
    RolloutGroup,
    TrainGroup,
)
from rayrlhf.actors.role_specs import RoleSpecs
from rayrlhf.actors.rollout_actor import RolloutActor
from rayrlhf.actors.scoring_actors import ReferenceActor, RewardActor
from rayrlhf.actors.train_actor import CriticActor, PolicyActor
from rayrlhf.actors.waiting import wait_all
from rayrlhf.actors.worker import Worker
from rayrlhf.errors import ActorLostError, DeadlineError, UserError

ACTOR_CLASSES: Mapping[Role, type[Worker]] = {
    "policy": PolicyActor,
    "critic": CriticActor,
    "reference": ReferenceActor,
    "reward": RewardActor,
    "rollout": RolloutActor,
}
CLOSE_SECONDS = 30.0
SAY_SECONDS = 2.0
"""Wait for resources after which it is said what is waited for."""
_KINDS = ("CPU", "GPU")


@dataclass(frozen=True, slots=True)
class ActorGroups:
    """Actors of a run by role; they have no models until `load_models`.

    Attributes:
        groups: the current actors; `restart` replaces some.
        plan: the initial placement.
        workers: the current placement.
        specs: what the actors are built from.
        run_name: first part of every actor's name.
        placement_groups: by name.
    """

    groups: dict[Role, ActorGroup[Worker]]
    plan: ResourcePlan
    workers: dict[Role, tuple[WorkerPlacement, ...]]
    specs: RoleSpecs
    run_name: str
    placement_groups: dict[str, PlacementGroup]

    @overload
    def __getitem__(self, role: Literal["policy"]) -> PolicyGroup: ...
    @overload
    def __getitem__(self, role: Literal["critic"]) -> CriticGroup: ...
    @overload
    def __getitem__(self, role: Literal["reference"]) -> ReferenceGroup: ...
    @overload
    def __getitem__(self, role: Literal["reward"]) -> RewardGroup: ...
    @overload
    def __getitem__(self, role: Literal["rollout"]) -> RolloutGroup: ...
    @overload
    def __getitem__(self, role: TrainRole) -> TrainGroup: ...
    @overload
    def __getitem__(self, role: ForwardRole) -> TrainGroup | ReferenceGroup: ...
    @overload
    def __getitem__(self, role: Role) -> ActorGroup[Worker]: ...
    def __getitem__(self, role: Role) -> ActorGroup[Worker]:
        """Return the actors of one role."""
        return self.groups[role]

    def __contains__(self, role: Role) -> bool:
        """Return True if the run has the role."""
        return role in self.groups

    def load_checks(self, seconds: float) -> dict[str, str]:
        """Return the outcomes of the checks on load by role, as rank 0 found them."""
        calls: dict[str, Ref[str]] = {role: group.call_rank(0, Worker.load_check) for role, group in self.groups.items()}
        found = zip(calls, wait_all(calls, "check of the models", seconds), strict=True)
        return {role: line for role, line in found if line}

    def restart(self, role: StatelessRole, rank: int) -> Ref[None]:
        """Replace one process of a role without training state; returns its `build`, without waiting."""
        self._replace(role, rank)
        return self.build_rank(role, rank)

    def restart_gang(self, role: TrainRole, seconds: float) -> PendingCalls[None]:
        """Replace all processes of a role in training; returns their `build`.

        A process group cannot continue without a member.

        Raises:
            ActorLostError: the new rank 0 died as well.
            DeadlineError: it did not respond in time.
        """
        for rank in range(len(self.groups[role])):
            self._replace(role, rank)
        return self.build_gang(role, seconds)

    def build_gang(self, role: TrainRole, seconds: float) -> PendingCalls[None]:
        """Begin to load a model in training; waits for the address of rank 0."""
        return self[role].build(self.specs.train(role), self.specs.backend(role), seconds)

    def build_rank(self, role: StatelessRole, rank: int) -> Ref[None]:
        """Begin to load the model of one rank of a role without training state."""
        match role:
            case "reference":
                return self["reference"].build(rank, self.specs.reference())
            case "reward":
                return self["reward"].build(rank, self.specs.reward())
            case "rollout":
                return self["rollout"].build(rank, self.specs.rollout())

    def _replace(self, role: Role, rank: int) -> None:
        group = self.groups[role]
        ray.kill(group.handles[rank])
        handle = self._create(role, group.names[rank], self.workers[role][rank])
        self.groups[role] = replace(group, handles=(*group.handles[:rank], handle, *group.handles[rank + 1 :]))

    def request_placement_group(self, name: str) -> PlacementGroup:
        """Request a named placement group for one more rollout replica, without waiting for it."""
        group = replica_group(self.plan)
        self.placement_groups[name] = _create_placement_group(group)
        return self.placement_groups[name]

    def release_placement_group(self, name: str) -> None:
        """Remove a placement group, or cancel its request."""
        remove_placement_group(self.placement_groups.pop(name))

    def add_replica(self, placement_group_name: str) -> Ref[None]:
        """Start one more rollout replica in a placement group; returns its `build`, without waiting."""
        group, first = self.groups["rollout"], self.plan.workers["rollout"][0]
        worker = replace(first, group=placement_group_name, bundles=(0,))
        name = f"{self.run_name}/rollout/{len(group)}"
        handle = self._create("rollout", name, worker)
        self.workers["rollout"] = (*self.workers["rollout"], worker)
        self.groups["rollout"] = replace(group, names=(*group.names, name), handles=(*group.handles, handle))
        return self.build_rank("rollout", len(group))

    def remove_replica(self) -> None:
        """End the rollout replica of the highest rank, and release its placement group if unused."""
        group, worker = self.groups["rollout"], self.workers["rollout"][-1]
        ray.kill(group.handles[-1])
        self.groups["rollout"] = replace(group, names=group.names[:-1], handles=group.handles[:-1])
        self.workers["rollout"] = self.workers["rollout"][:-1]
        if not any(worker.group == other.group for workers in self.workers.values() for other in workers):
            self.release_placement_group(worker.group)

    def _create(self, role: Role, name: str, worker: WorkerPlacement) -> Handle[Worker]:
        environment = self.specs.environment(role)
        return create_actor(name, ACTOR_CLASSES[role], worker, self.placement_groups[worker.group], environment)


def read_cluster_resources() -> ClusterResources:
    """Return the resources of the connected cluster's live nodes."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return ClusterResources(tuple(node.get("CPU", 0.0) for node in nodes), tuple(node.get("GPU", 0.0) for node in nodes))


@contextmanager
def started_actor_groups(
    run_name: str, specs: RoleSpecs, placement_seconds: float, say: Callable[[str], None]
) -> Iterator[ActorGroups]:
    """Start a process for every worker, and end all of them with the block.

    The processes import their modules in the background; `load_models` loads their models.

    Raises:
        UserError: the cluster did not grant a placement group in time.
    """
    plan = specs.plan
    placement_groups: dict[str, PlacementGroup] = {}
    groups: dict[Role, ActorGroup[Worker]] = {}
    try:
        for name, group in plan.groups.items():
            placement_groups[name] = _create_placement_group(group)
        _await_placement_groups(placement_groups, plan, placement_seconds, say)
        for role, workers in plan.workers.items():
            groups[role] = _create_group(role, workers, placement_groups, run_name, specs.environment(role))
            groups[role].call(Worker.preload)
        actor_groups = ActorGroups(groups, plan, dict(plan.workers), specs, run_name, placement_groups)
        yield actor_groups
        _close(actor_groups)
    finally:
        for actors in groups.values():
            actors.kill()
        for reserved in placement_groups.values():
            remove_placement_group(reserved)


def _create_group(
    role: Role,
    workers: Sequence[WorkerPlacement],
    placement_groups: Mapping[str, PlacementGroup],
    run_name: str,
    environment: Mapping[str, str],
) -> ActorGroup[Worker]:
    names = tuple(f"{run_name}/{role}/{rank}" for rank in range(len(workers)))
    handles = tuple(
        create_actor(name, ACTOR_CLASSES[role], worker, placement_groups[worker.group], environment)
        for name, worker in zip(names, workers, strict=True)
    )
    return GROUP_CLASSES[role](role, names, handles)


def _create_placement_group(group: GroupPlan) -> PlacementGroup:
    labels = [dict(group.labels)] * len(group.bundles) if group.labels else None
    return placement_group([dict(bundle) for bundle in group.bundles], group.strategy, bundle_label_selector=labels)


def _await_placement_groups(
    placement_groups: Mapping[str, PlacementGroup], plan: ResourcePlan, seconds: float, say: Callable[[str], None]
) -> None:
    began, told = time.monotonic(), False
    for name, group in placement_groups.items():
        while not group.wait(max(0.01, min(SAY_SECONDS, began + seconds - time.monotonic()))):
            if not told:
                say(f"waiting up to {seconds:.0f} s for {_shortage(plan)}")
                told = True
            if time.monotonic() - began >= seconds:
                wanted = _requested(plan.groups[name])
                raise UserError(f"{wanted} not granted within {seconds:.0f} s (placement.wait_seconds): {_shortage(plan)}")


def _shortage(plan: ResourcePlan) -> str:
    """Return the request, the free resources, and the runs that hold the others."""
    free, total = ray.available_resources(), ray.cluster_resources()
    wanted = {kind: sum(bundle.get(kind, 0) for group in plan.groups.values() for bundle in group.bundles) for kind in _KINDS}
    parts = [
        f"{wanted[kind]:g} {kind}s, of {total.get(kind, 0):g} are {free.get(kind, 0):g} free" for kind in _KINDS if wanted[kind]
    ]
    named = ray.util.list_named_actors(all_namespaces=True)
    holders = sorted({actor["name"].partition("/")[0] for actor in named if "/" in actor["name"]})
    held = f"held by {', '.join(f'run {name}' for name in holders)}" if holders else "held by other jobs: see `ray list actors`"
    return f"{', '.join(parts)}; {held}"


def _requested(group: GroupPlan) -> str:
    labels = ", ".join(f"{key}={value}" for key, value in group.labels.items())
    sizes = ", ".join(f"{amount:g} {kind}s" for kind, amount in group.bundles[0].items())
    return f"{len(group.bundles)} x ({sizes}){f', on nodes with {labels}' if labels else ''}"


def _close(actor_groups: ActorGroups) -> None:
    """Let rollout engines free resources outside their processes, which are killed next."""
    if "rollout" in actor_groups:
        with suppress(ActorLostError, DeadlineError):
            wait_all(actor_groups["rollout"].close(), "rollout.close", CLOSE_SECONDS)
