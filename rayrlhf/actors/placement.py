"""Where every process of a run sits: a pure function from the config and the machine to placement groups and workers.

Colocated roles share the bundles of one placement group by fractions; disaggregated roles get a group each; a
tensor-parallel replica always has a group of its own on one node, so that it can be lost and rebuilt alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rayrlhf.config.ppo import PPOConfig
from rayrlhf.errors import UserError

Role = Literal["policy", "critic", "reference", "reward", "rollout"]
Strategy = Literal["PACK", "STRICT_PACK"]


@dataclass(frozen=True, slots=True)
class ClusterResources:
    """What a cluster offers: CPUs and GPUs of each live node."""

    node_cpus: tuple[float, ...]
    node_gpus: tuple[float, ...]

    @property
    def cpus(self) -> float:
        """CPUs over all nodes."""
        return sum(self.node_cpus)

    @property
    def gpus(self) -> float:
        """GPUs over all nodes."""
        return sum(self.node_gpus)


@dataclass(frozen=True, slots=True)
class Demand:
    """What one role asks for: processes, and per process CPUs, GPUs and threads (None: decided here)."""

    role: Role
    ranks: int
    cpus: float | None
    gpus: float | None
    threads: int | None
    uses_gpu: bool = True
    devices: int = 1
    """GPUs a process spans (tensor parallelism)."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels of the nodes it may sit on."""


@dataclass(frozen=True, slots=True)
class WorkerPlacement:
    """One process's place: a placement group, its bundles (several for a tensor-parallel replica), and its share."""

    group: str
    bundles: tuple[int, ...]
    cpus: float
    gpus: float
    threads: int


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One placement group to create."""

    strategy: Strategy
    bundles: tuple[Mapping[str, float], ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    """What a node of every bundle must be labelled with."""


@dataclass(frozen=True, slots=True)
class ResourcePlan:
    """All placement groups by name, all workers by role, and whether roles work at the same time."""

    groups: Mapping[str, GroupPlan]
    workers: Mapping[Role, tuple[WorkerPlacement, ...]]
    overlap: bool


def demands(config: PPOConfig) -> list[Demand]:
    """The roles this config starts. Roles that the objective does not need are not among them."""
    location = config.placement
    roles: list[tuple[Role, bool]] = [
        ("policy", True),
        ("critic", config.critic.kind == "separate"),
        ("reference", config.needs_reference and not config.reference_in_policy),
        ("reward", True),
    ]
    wanted = []
    for role, needed in roles:
        if needed:
            part = getattr(location, role)
            uses_gpu = role != "reward" or config.reward.model is not None
            wanted.append(Demand(role, part.ranks, part.cpus, part.gpus, part.threads, uses_gpu, labels=part.labels))
    tensor_parallel = config.rollout.tensor_parallel_size
    rollout = Demand(
        "rollout",
        config.rollout.replicas,
        location.rollout_cpus,
        location.rollout_gpus,
        location.rollout_threads,
        devices=tensor_parallel,
        labels=location.rollout_labels,
    )
    return [*wanted, rollout]


def make_plan(config: PPOConfig, machine: ClusterResources) -> ResourcePlan:
    """WorkerPlacement every process of the run.

    Raises:
        UserError: the machine has fewer CPUs or GPUs than the placement asks for (says asked and available).
    """
    wanted = demands(config)
    colocated = config.placement.mode == "colocated"
    overlap = _overlap(config, machine)
    resolved = [_resolve_demand(demand, wanted, machine, colocated, overlap) for demand in wanted]
    plan = _colocated(resolved, overlap) if colocated else _disaggregated(resolved, overlap)
    _check_fits(plan, resolved, machine)
    _check_transfer(config, plan)
    return plan


def _overlap(config: PPOConfig, machine: ClusterResources) -> bool:
    """Roles that share devices take turns, and `exact` runs keep one fixed order of batches."""
    if config.run.determinism == "exact":
        return False
    if config.placement.overlap != "auto":
        return config.placement.overlap == "on"
    return config.placement.mode == "disaggregated" and (machine.gpus > 0 or machine.cpus >= 8)


@dataclass(frozen=True, slots=True)
class _ResolvedDemand:
    role: Role
    ranks: int
    cpus: float
    gpus: float
    threads: int
    devices: int
    labels: Mapping[str, str]


def _resolve_demand(
    demand: Demand, wanted: Sequence[Demand], machine: ClusterResources, colocated: bool, overlap: bool
) -> _ResolvedDemand:
    """Fill in what the user left open."""
    processes = sum(other.ranks for other in wanted)
    cpus = demand.cpus or (1.0 if machine.gpus else _floor(machine.cpus / processes))
    if demand.gpus is not None:
        gpus = demand.gpus
    elif machine.gpus == 0 or not demand.uses_gpu:
        gpus = 0.0
    elif demand.devices > 1 or not colocated:
        gpus = float(demand.devices)
    else:
        gpus = _floor(1.0 / sum(other.uses_gpu and other.devices == 1 for other in wanted))
    node_cpus = int(min(machine.node_cpus, default=1.0))
    threads = demand.threads or max(1, int(cpus) if overlap or machine.gpus else node_cpus)
    return _ResolvedDemand(demand.role, demand.ranks, cpus, gpus, threads, demand.devices, demand.labels)


def _floor(value: float) -> float:
    """Two decimals, rounded down, so that shares never add up to more than the whole."""
    return max(math.floor(value * 100) / 100, 0.01)


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": round(cpus, 4)} | ({"GPU": math.ceil(gpus - 1e-9) if gpus > 1 else round(gpus, 4)} if gpus else {})


def _colocated(resolved: Sequence[_ResolvedDemand], overlap: bool) -> ResourcePlan:
    """Rank i of every role shares bundle i; tensor-parallel replicas stand apart."""
    shared = [part for part in resolved if part.devices == 1]
    width = max(part.ranks for part in shared)
    bundles = []
    for index in range(width):
        present = [part for part in shared if index < part.ranks]
        gpus = sum(part.gpus for part in present)
        bundles.append(_bundle(sum(part.cpus for part in present), math.ceil(gpus - 1e-9)))
    groups: dict[str, GroupPlan] = {"colocated": GroupPlan("PACK", tuple(bundles))}
    workers: dict[Role, tuple[WorkerPlacement, ...]] = {}
    for part in resolved:
        if part.devices == 1:
            workers[part.role] = tuple(
                WorkerPlacement("colocated", (i,), part.cpus, part.gpus, part.threads) for i in range(part.ranks)
            )
        else:
            workers[part.role] = _replica_groups(part, groups)
    return ResourcePlan(groups, workers, overlap)


def _disaggregated(resolved: Sequence[_ResolvedDemand], overlap: bool) -> ResourcePlan:
    groups: dict[str, GroupPlan] = {}
    workers: dict[Role, tuple[WorkerPlacement, ...]] = {}
    for part in resolved:
        if part.role == "rollout":
            workers[part.role] = _replica_groups(part, groups)
            continue
        groups[part.role] = GroupPlan("PACK", tuple(_bundle(part.cpus, part.gpus) for _ in range(part.ranks)), part.labels)
        workers[part.role] = tuple(
            WorkerPlacement(part.role, (i,), part.cpus, part.gpus, part.threads) for i in range(part.ranks)
        )
    return ResourcePlan(groups, workers, overlap)


def building_order(workers: Mapping[Role, Sequence[WorkerPlacement]]) -> list[list[Role]]:
    """Which roles may load their models side by side: all of them, unless samplers share GPUs with others.

    vLLM measures how much of a GPU its model takes while it starts, and takes what others load meanwhile for its own; so it
    goes first.
    """
    others: list[Role] = [role for role in workers if role != "rollout"]
    places = {(worker.group, bundle) for role in others for worker in workers[role] if worker.gpus for bundle in worker.bundles}
    shares = any((worker.group, bundle) in places for worker in workers["rollout"] if worker.gpus for bundle in worker.bundles)
    return [["rollout"], others] if shares else [list(workers)]


def _replica_groups(part: _ResolvedDemand, groups: dict[str, GroupPlan]) -> tuple[WorkerPlacement, ...]:
    """One group a rollout replica, on one node when it spans several devices."""
    workers = []
    for index in range(part.ranks):
        name = f"{part.role}-{index}"
        per_device = part.gpus / part.devices
        bundles = tuple(_bundle(part.cpus, per_device) for _ in range(part.devices))
        groups[name] = GroupPlan("STRICT_PACK", bundles, part.labels)
        workers.append(WorkerPlacement(name, tuple(range(part.devices)), part.cpus, per_device, part.threads))
    return tuple(workers)


def replica_group(plan: ResourcePlan) -> GroupPlan:
    """Room for one more rollout replica like those of the plan."""
    worker = plan.workers["rollout"][0]
    group = plan.groups[worker.group]
    bundles = tuple(_bundle(worker.cpus, worker.gpus) for _ in worker.bundles)
    return GroupPlan("STRICT_PACK", bundles, group.labels)


def _check_transfer(config: PPOConfig, plan: ResourcePlan) -> None:
    transfer = config.rollout.weight_transfer
    for role in ("policy", "rollout"):
        if transfer != "shared_memory" and not plan.workers[role][0].gpus:
            raise UserError(
                f"rollout.weight_transfer: {transfer!r} goes from GPU to GPU, and the {role} has none; expected 'shared_memory'"
            )


def _check_fits(plan: ResourcePlan, resolved: Sequence[_ResolvedDemand], machine: ClusterResources) -> None:
    asked_cpus = sum(bundle["CPU"] for group in plan.groups.values() for bundle in group.bundles)
    asked_gpus = sum(bundle.get("GPU", 0) for group in plan.groups.values() for bundle in group.bundles)
    if asked_cpus <= machine.cpus + 1e-6 and asked_gpus <= machine.gpus + 1e-6:
        return
    parts = ", ".join(f"{part.role} {part.ranks} x ({part.cpus:g} CPU, {part.gpus:g} GPU)" for part in resolved)
    raise UserError(
        f"placement: asked for {asked_cpus:g} CPUs and {asked_gpus:g} GPUs ({parts}), "
        f"but the cluster has {machine.cpus:g} CPUs and {machine.gpus:g} GPUs; lower placement.*.cpus/gpus/ranks or add nodes"
    )
