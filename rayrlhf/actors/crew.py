"""All actors of a run: placed, started side by side, and ended together."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from rayrlhf.actors.group import ActorGroup, create_group
from rayrlhf.actors.placement import Machine, ResourcePlan, Role
from rayrlhf.actors.reference_actor import ReferenceActor
from rayrlhf.actors.reward_actor import RewardActor
from rayrlhf.actors.rollout_actor import RolloutActor
from rayrlhf.actors.specs import RoleSpecs
from rayrlhf.actors.train_actor import CriticActor, PolicyActor, TrainActor
from rayrlhf.actors.waiting import wait_all
from rayrlhf.engines.process_group import ProcessGroupSpec
from rayrlhf.errors import DeadlineError, UserError

ACTOR_CLASSES: Mapping[Role, type] = {
    "policy": PolicyActor,
    "critic": CriticActor,
    "reference": ReferenceActor,
    "reward": RewardActor,
    "rollout": RolloutActor,
}


@dataclass(frozen=True, slots=True)
class Crew:
    """The actors of a run by role; a role the objective does not need is absent. They are there, but empty until `build`."""

    groups: Mapping[Role, ActorGroup]
    plan: ResourcePlan
    specs: RoleSpecs

    def __getitem__(self, role: Role) -> ActorGroup:
        """The actors of one role."""
        return self.groups[role]

    def __contains__(self, role: Role) -> bool:
        """Whether the role was started."""
        return role in self.groups

    def build(self, seconds: float) -> None:
        """Load all models at once: loading is mostly reading and importing, so it overlaps well even on two cores.

        Raises:
            UserError: a role refuses its spec.
            DeadlineError: a role was not ready in time.
        """
        calls: dict[str, ray.ObjectRef] = {}
        for role, group in self.groups.items():
            if issubclass(ACTOR_CLASSES[role], TrainActor):
                members = _process_groups(group, self.specs.backend(role), seconds)
                calls |= group.call_each("build", [(member, self.specs.train(role)) for member in members])
            else:
                calls |= group.call("build", *self.specs.arguments(role))
        try:
            wait_all(calls, "start", seconds)
        except DeadlineError as error:
            raise DeadlineError(f"{error}; is the model still downloading, or the machine short of memory?") from error


def read_machine() -> Machine:
    """What the connected cluster offers, live nodes only."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Machine(tuple(node.get("CPU", 0.0) for node in nodes), tuple(node.get("GPU", 0.0) for node in nodes))


@contextmanager
def started_crew(run_name: str, specs: RoleSpecs, placement_seconds: float) -> Iterator[Crew]:
    """Start a process for every seat and end them all on the way out, whatever happened in between.

    The processes import what they will need on their own time; `Crew.build` gives them their models.

    Raises:
        UserError: the cluster cannot seat a placement group in time.
    """
    plan = specs.plan
    placement_groups: dict[str, PlacementGroup] = {}
    groups: dict[Role, ActorGroup] = {}
    try:
        for name, group in plan.groups.items():
            placement_groups[name] = placement_group([dict(bundle) for bundle in group.bundles], group.strategy)
        _await_placement(placement_groups, plan, placement_seconds)
        for role, seats in plan.seats.items():
            environment = specs.environment(role)
            groups[role] = create_group(role, ACTOR_CLASSES[role], seats, placement_groups, run_name, environment)
            groups[role].call("preload")
        yield Crew(groups, plan, specs)
        _close(groups)
    finally:
        for actors in groups.values():
            actors.kill()
        for placed in placement_groups.values():
            remove_placement_group(placed)


def _await_placement(placed: Mapping[str, PlacementGroup], plan: ResourcePlan, seconds: float) -> None:
    end = time.monotonic() + seconds
    for name, group in placed.items():
        if not group.wait(max(end - time.monotonic(), 0.01)):
            asked = [dict(bundle) for bundle in plan.groups[name].bundles]
            available = {key: value for key, value in ray.available_resources().items() if key in ("CPU", "GPU")}
            raise UserError(
                f"placement group {name!r}: asked for bundles {asked} ({plan.groups[name].strategy}), "
                f"not granted within {seconds:.0f} s; free in the cluster now: {available}"
            )


def _process_groups(group: ActorGroup, backend: Literal["gloo", "nccl"], seconds: float) -> list[ProcessGroupSpec]:
    """Ranks, world size and meeting point of a role's process group."""
    address, port = wait_all({group.names[0]: group.handles[0].rendezvous.remote()}, "rendezvous", seconds)[0]
    return [ProcessGroupSpec(rank, len(group), address, port, backend) for rank in range(len(group))]


def _close(groups: Mapping[Role, ActorGroup]) -> None:
    """Let engines free what they hold outside their process; bounded, since killing follows anyway."""
    if "rollout" in groups:
        groups["rollout"].all("close", seconds=30)
