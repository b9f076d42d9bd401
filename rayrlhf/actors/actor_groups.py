"""All actors of a run: placed, started in parallel and ended together."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Literal, overload

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from rayrlhf.actors.actor_group import ActorGroup, create_actor
from rayrlhf.actors.placement import (
    ClusterResources,
    ForwardRole,
    FrozenRole,
    GroupPlan,
    ResourcePlan,
    RewardRole,
    Role,
    StatelessRole,
    TrainRole,
    WorkerPlacement,
    replica_group,
)
from rayrlhf.actors.remote import Handle, PendingCalls, Ref
from rayrlhf.actors.reward_actor import RewardActor
from rayrlhf.actors.role_groups import (
    GROUP_CLASSES,
    CriticGroup,
    JudgeGroup,
    PolicyGroup,
    ReferenceGroup,
    RewardGroup,
    RolloutGroup,
    TrainGroup,
)
from rayrlhf.actors.role_specs import RoleSpecs
from rayrlhf.actors.rollout_actor import RolloutActor
from rayrlhf.actors.scoring_actors import JudgeActor, ReferenceActor
from rayrlhf.actors.train_actor import CriticActor, PolicyActor
from rayrlhf.actors.waiting import wait_all
from rayrlhf.actors.worker import ModelCheck, Worker
from rayrlhf.errors import ActorLostError, DeadlineError, UserError

ACTOR_CLASSES: Mapping[Role, type[Worker]] = {
    "policy": PolicyActor,
    "critic": CriticActor,
    "reference": ReferenceActor,
    "teacher": ReferenceActor,
    "reward": RewardActor,
    "judge": JudgeActor,
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
        sharing: roles that compute common beginnings of samples once; known after `load_checks`.
    """

    groups: dict[Role, ActorGroup[Worker]]
    plan: ResourcePlan
    workers: dict[Role, tuple[WorkerPlacement, ...]]
    specs: RoleSpecs
    run_name: str
    placement_groups: dict[str, PlacementGroup]
    sharing: set[Role] = field(default_factory=set)

    @overload
    def __getitem__(self, role: Literal["policy"]) -> PolicyGroup: ...
    @overload
    def __getitem__(self, role: Literal["critic"]) -> CriticGroup: ...
    @overload
    def __getitem__(self, role: FrozenRole) -> ReferenceGroup: ...
    @overload
    def __getitem__(self, role: Literal["reward"]) -> RewardGroup: ...
    @overload
    def __getitem__(self, role: Literal["judge"]) -> JudgeGroup: ...
    @overload
    def __getitem__(self, role: RewardRole) -> RewardGroup | JudgeGroup: ...
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

    def load_checks(self, roles: Sequence[Role], seconds: float) -> dict[str, str]:
        """Return the outcomes of the checks on load by role, as rank 0 found them."""
        calls: dict[str, Ref[ModelCheck]] = {
            self.groups[role].names[0]: self.groups[role].call_rank(0, Worker.load_check) for role in roles
        }
        found = dict(zip(roles, wait_all(calls, "check of the models", seconds), strict=True))
        self.sharing.update(role for role, check in found.items() if check.shares_prefixes)
        return {role: check.line for role, check in found.items() if check.line}

    def restart(self, role: StatelessRole, rank: int) -> Ref[None]:
        """Replace one process of a role without training state; returns its `build`, without waiting."""
        self.replace(role, (rank,))
        return self.build_rank(role, rank)

    def build_gang(self, role: TrainRole, seconds: float) -> PendingCalls[None]:
        """Begin to load a model in training; waits for the address of rank 0.

        Raises:
            ActorLostError: rank 0 died.
            DeadlineError: it did not respond in time.
        """
        return self[role].build(self.specs.train(role), self.specs.backend(role), seconds)

    def build_rank(self, role: StatelessRole, rank: int) -> Ref[None]:
        """Begin to load the model of one rank of a role without training state."""
        match role:
            case "reference" | "teacher":
                return self[role].build(rank, self.specs.frozen(role))
            case "reward":
                return self["reward"].build(rank, *self.specs.reward())
            case "judge":
                return self["judge"].build(rank, self.specs.judge())
            case "rollout":
                return self["rollout"].build(rank, self.specs.rollout())

    def replace(self, role: Role, ranks: Iterable[int]) -> None:
        """Replace processes of a role by new ones without models; in training, all ranks."""
        for rank in ranks:
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
        worker = replace(first, group=placement_group_name, bundles=tuple(range(len(first.bundles))))
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


def _wanted(plan: ResourcePlan) -> dict[str, float]:
    bundles = [bundle for group in plan.groups.values() for bundle in group.bundles]
    return {kind: sum(bundle.get(kind, 0) for bundle in bundles) for kind in _KINDS}


def _await_placement_groups(
    placement_groups: Mapping[str, PlacementGroup], plan: ResourcePlan, seconds: float, say: Callable[[str], None]
) -> None:
    began, told, all_wanted = time.monotonic(), False, _wanted(plan)
    for name, group in placement_groups.items():
        while not group.wait(max(0.01, min(SAY_SECONDS, began + seconds - time.monotonic()))):
            if not told:
                say(f"waiting up to {seconds:.0f} s for {shortage(all_wanted)}")
                told = True
            if time.monotonic() - began >= seconds:
                wanted = _requested(plan.groups[name])
                raise UserError(f"{wanted} not granted within {seconds:.0f} s (placement.wait_seconds): {shortage(all_wanted)}")


def wait_for_room(wanted: Mapping[str, float], say: Callable[[str], None]) -> None:
    """Wait up to `SAY_SECONDS` for free CPUs and GPUs of the connected cluster.

    If they are not enough by then, report the missing resources.
    """
    end = time.monotonic() + SAY_SECONDS
    while any(ray.available_resources().get(kind, 0.0) < amount - 1e-6 for kind, amount in wanted.items() if amount):
        if time.monotonic() > end:
            say(f"waiting for {shortage(wanted)}")
            return
        time.sleep(0.2)


def shortage(wanted: Mapping[str, float]) -> str:
    """Return the request, the free resources, and the runs that hold the others.

    Args:
        wanted: number of `CPU` and `GPU`.
    """
    free, total = ray.available_resources(), ray.cluster_resources()
    parts = [
        f"{wanted[kind]:g} {kind}s, of {total.get(kind, 0):g} are {free.get(kind, 0):g} free"
        for kind in _KINDS
        if wanted.get(kind)
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
    """Let engines of replicas free resources outside their processes, which are killed next."""
    closing: PendingCalls[None] = actor_groups["rollout"].close() if "rollout" in actor_groups else {}
    closing |= actor_groups["judge"].close() if "judge" in actor_groups else {}
    with suppress(ActorLostError, DeadlineError):
        wait_all(closing, "close", CLOSE_SECONDS)
