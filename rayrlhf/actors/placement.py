"""Plan of placement groups and workers, computed only from the configuration and the cluster.

Colocated roles share the bundles of one placement group by fractions; disaggregated roles get a group each; a replica of
several devices always has its own group, so that it can be lost and rebuilt alone: one bundle on one node, or where no node can
hold it, a bundle of whole pipeline stages on each of several.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from rayrlhf.config.ppo import PPOConfig
from rayrlhf.errors import UserError

TrainRole = Literal["policy", "critic"]
FrozenRole = Literal["reference", "teacher"]
RewardRole = Literal["reward", "judge"]
"""Roles that compute rewards."""
StatelessRole = Literal[FrozenRole, RewardRole, "rollout"]
ForwardRole = Literal[TrainRole, FrozenRole]
"""Roles whose models compute log-probs or values."""
Role = Literal[TrainRole, StatelessRole]
ENGINE_ROLES: tuple[Role, ...] = ("rollout", "judge")
"""Roles of replicas that generate."""
Strategy = Literal["PACK", "STRICT_PACK"]
Transfer = Literal["shared_memory", "nccl", "ipc"]
GPU_THREADS = 16
"""Maximum threads by default of a process on a GPU: for loading, captures and the optimizer of `train.offload_optimizer`."""


@dataclass(frozen=True, slots=True)
class ClusterResources:
    """CPUs and GPUs of each live node of a cluster."""

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
    """Resources one role requests: processes, and CPUs, GPUs and threads per process (None: chosen here)."""

    role: Role
    ranks: int
    cpus: float | None
    gpus: float | None
    threads: int | None
    uses_gpu: bool = True
    devices: int = 1
    """GPUs a process spans (tensor and pipeline parallelism)."""
    stages: int = 1
    """Equal parts of the devices that may be on different nodes (pipeline parallelism)."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Required node labels."""


@dataclass(frozen=True, slots=True)
class WorkerPlacement:
    """Placement of one process.

    Attributes:
        group: name of its placement group.
        bundles: indexes of its bundles; a replica over several nodes has one on each, and a process in each.
        cpus: share of the CPUs.
        gpus: share of a GPU, or a replica's number of GPUs on a node.
    """

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
    """Required labels of the node of every bundle."""


@dataclass(frozen=True, slots=True)
class ResourcePlan:
    """Placement groups by name, workers by role, and `overlap`: roles run at the same time."""

    groups: Mapping[str, GroupPlan]
    workers: Mapping[Role, tuple[WorkerPlacement, ...]]
    overlap: bool


def demands(config: PPOConfig) -> list[Demand]:
    """Return the demands of all roles that the configuration needs."""
    placement = config.placement
    roles: list[tuple[Role, bool]] = [
        ("policy", True),
        ("critic", config.critic.kind == "separate"),
        ("reference", config.needs_reference and not config.reference_in_policy),
        ("teacher", config.teacher is not None),
        ("reward", config.reward.computed),
    ]
    requested = []
    for role, needed in roles:
        if needed:
            part = getattr(placement, role)
            uses_gpu = role != "reward" or config.reward.model is not None
            requested.append(Demand(role, part.ranks, part.cpus, part.gpus, part.threads, uses_gpu, labels=part.labels))
    if (judge := config.reward.judge) is not None:
        part = placement.judge
        size = judge.tensor_parallel_size
        requested.append(Demand("judge", judge.replicas, part.cpus, part.gpus, part.threads, devices=size, labels=part.labels))
    rollout = Demand(
        "rollout",
        config.rollout.replicas,
        placement.rollout_cpus,
        placement.rollout_gpus,
        placement.rollout_threads,
        devices=config.rollout.devices,
        stages=config.rollout.pipeline_parallel_size,
        labels=placement.rollout_labels,
    )
    return [*requested, rollout]


def make_plan(config: PPOConfig, machine: ClusterResources) -> ResourcePlan:
    """Plan the placement of every process of the run.

    Raises:
        UserError: the machine has fewer CPUs or GPUs than the placement requests, or its nodes cannot hold the stages of a
            replica.
    """
    requested = demands(config)
    colocated = config.placement.mode == "colocated"
    overlap = _overlap(config, machine)
    resolved = [_resolve_demand(demand, requested, machine, colocated, overlap) for demand in requested]
    plan = _colocated(resolved, overlap) if colocated else _disaggregated(resolved, overlap)
    _check_fits(plan, resolved, machine)
    _check_transfer(config, plan)
    return plan


def _overlap(config: PPOConfig, machine: ClusterResources) -> bool:
    """Return True if roles overlap; `exact` runs fix the order of batches."""
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
    nodes: int


def _resolve_demand(
    demand: Demand, requested: Sequence[Demand], machine: ClusterResources, colocated: bool, overlap: bool
) -> _ResolvedDemand:
    """Choose the values that the configuration leaves open."""
    processes = sum(other.ranks * other.devices for other in requested)
    cpus = demand.cpus or demand.devices * (1.0 if machine.gpus else _floor(machine.cpus / processes))
    if demand.gpus is not None:
        gpus = demand.gpus
    elif machine.gpus == 0 or not demand.uses_gpu:
        gpus = 0.0
    elif demand.devices > 1 or not colocated:
        gpus = float(demand.devices)
    else:
        gpus = _floor(1.0 / sum(other.uses_gpu and other.devices == 1 for other in requested))
    if demand.devices > 1 and gpus not in (0.0, demand.devices):
        key, section = ("rollout_gpus", "rollout") if demand.role == "rollout" else ("judge.gpus", "reward.judge")
        size = f"{section}.tensor_parallel_size" + (" x pipeline_parallel_size" if demand.stages > 1 else "")
        raise UserError(f"placement.{key}: a replica takes whole GPUs, expected {demand.devices} ({size}), found {gpus:g}")
    nodes = nodes_of_replica(demand.stages, cpus, gpus, machine)
    node_cpus = int(min(machine.node_cpus, default=1.0))
    if machine.gpus:
        peers = processes if overlap else demand.ranks * demand.devices
        own = min(node_cpus // math.ceil(peers / len(machine.node_cpus)), GPU_THREADS * demand.devices // nodes)
        threads = demand.threads or max(1, int(cpus / nodes), own)
    else:
        threads = demand.threads or max(1, int(cpus / nodes) if overlap else node_cpus)
    return _ResolvedDemand(demand.role, demand.ranks, cpus, gpus, threads, demand.devices, demand.labels, nodes)


def nodes_of_replica(stages: int, cpus: float, gpus: float, machine: ClusterResources) -> int:
    """Return the smallest number of equal bundles with which a cluster's nodes hold a replica.

    A stage is whole on one node, because its devices exchange activations in every layer.

    Args:
        stages: pipeline-parallel size.
        cpus: of the whole replica.
        gpus: of the whole replica.

    Raises:
        UserError: there is none, and there are several stages; one stage counts as one bundle.
    """
    offered = list(zip(machine.node_cpus, machine.node_gpus, strict=True))
    for nodes in (count for count in range(1, stages + 1) if stages % count == 0):
        wanted = (cpus / nodes, gpus / nodes)
        held = sum(min(int((of + 1e-6) // part) for of, part in zip(node, wanted, strict=True) if part) for node in offered)
        if held >= nodes or stages == 1:
            return nodes
    raise UserError(
        f"rollout.pipeline_parallel_size {stages}: a replica has stages of {cpus / stages:g} CPUs and {gpus / stages:g} GPUs, "
        f"each whole on a node; available: {len(offered)} nodes of at most {max(machine.node_cpus):g} CPUs and "
        f"{max(machine.node_gpus):g} GPUs"
    )


def _floor(value: float) -> float:
    """Round down to two decimals, so that shares never exceed the whole."""
    return max(math.floor(value * 100) / 100, 0.01)


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": round(cpus, 4)} | ({"GPU": math.ceil(gpus - 1e-9) if gpus > 1 else round(gpus, 4)} if gpus else {})


def _colocated(resolved: Sequence[_ResolvedDemand], overlap: bool) -> ResourcePlan:
    """Share bundle i between rank i of all roles, except replicas of several devices."""
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
        if part.role in ENGINE_ROLES:
            workers[part.role] = _replica_groups(part, groups)
            continue
        groups[part.role] = GroupPlan("PACK", tuple(_bundle(part.cpus, part.gpus) for _ in range(part.ranks)), part.labels)
        workers[part.role] = tuple(
            WorkerPlacement(part.role, (i,), part.cpus, part.gpus, part.threads) for i in range(part.ranks)
        )
    return ResourcePlan(groups, workers, overlap)


def without_roles(plan: ResourcePlan, roles: Collection[Role]) -> ResourcePlan:
    """Return a plan without some roles; the others keep resources and threads."""
    workers = {role: mine for role, mine in plan.workers.items() if role not in roles}
    used = {worker.group for mine in workers.values() for worker in mine}
    return replace(plan, workers=workers, groups={name: group for name, group in plan.groups.items() if name in used})


def building_order(workers: Mapping[Role, Sequence[WorkerPlacement]]) -> list[list[Role]]:
    """Order the roles' builds: all at once, unless replicas share GPUs with other roles.

    While it starts, vLLM measures the GPU memory its model takes and counts what others load meanwhile as its own. So these
    engines go first, one role after the other.
    """
    used = {
        role: {(worker.group, bundle) for worker in mine if worker.gpus for bundle in worker.bundles}
        for role, mine in workers.items()
    }
    engines = [role for role in ENGINE_ROLES if role in workers]
    others = [role for role in workers if role not in engines]
    shares = any(used[one] & used[other] for one in engines for other in workers if other != one)
    return [*([role] for role in engines), others] if shares else [list(workers)]


def _replica_groups(part: _ResolvedDemand, groups: dict[str, GroupPlan]) -> tuple[WorkerPlacement, ...]:
    """Create one group per replica.

    It has one bundle for each node: the process there holds all GPUs of the bundle, and vLLM's workers are its children.
    """
    workers = []
    for index in range(part.ranks):
        bundles, cpus = tuple(range(part.nodes)), round(part.cpus / part.nodes, 4)
        worker = WorkerPlacement(f"{part.role}-{index}", bundles, cpus, part.gpus / part.nodes, part.threads)
        groups[worker.group] = _replica_group(worker, part.labels)
        workers.append(worker)
    return tuple(workers)


def _replica_group(worker: WorkerPlacement, labels: Mapping[str, str]) -> GroupPlan:
    # Bundles of a replica over several nodes may share a node that has room for two.
    strategy: Strategy = "PACK" if len(worker.bundles) > 1 else "STRICT_PACK"
    return GroupPlan(strategy, (_bundle(worker.cpus, worker.gpus),) * len(worker.bundles), labels)


def replica_group(plan: ResourcePlan) -> GroupPlan:
    """Return the placement group of one more rollout replica like those of the plan."""
    worker = plan.workers["rollout"][0]
    return _replica_group(worker, plan.groups[worker.group].labels)


def serves_adapters(config: PPOConfig, plan: ResourcePlan) -> bool:
    """Return whether the rollout engine serves the policy's adapters unmerged.

    Resolves `rollout.lora: auto`; `model.dtype: auto` is resolved for this machine.
    """
    import torch

    from rayrlhf.models.load import resolve_dtype

    if config.model.lora is None or config.rollout.backend != "vllm" or config.rollout.pipeline_parallel_size > 1:
        return False
    if config.rollout.lora != "auto":
        return config.rollout.lora == "adapter"
    return plan.workers["policy"][0].gpus > 0 or resolve_dtype(config.model.dtype, cpu=True) != torch.float32


def weight_transfer(config: PPOConfig, plan: ResourcePlan) -> Transfer:
    """Return the transport of weights from the policy to the replicas.

    Resolves `rollout.weight_transfer: auto`.
    """
    transfer = config.rollout.weight_transfer
    if transfer != "auto":
        return transfer
    policy, replicas = plan.workers["policy"], plan.workers["rollout"]
    if config.rollout.backend != "vllm" or serves_adapters(config, plan) or not (policy[0].gpus and replicas[0].gpus):
        return "shared_memory"
    if next(_apart(plan), None) is None:
        return "ipc"
    # NCCL refuses two members on one device. Only replicas that take whole GPUs share none.
    apart = all(replica.group != policy[0].group and replica.gpus >= 1 for replica in replicas)
    return "nccl" if apart else "shared_memory"


def _check_transfer(config: PPOConfig, plan: ResourcePlan) -> None:
    transfer = weight_transfer(config, plan)
    for role in ("policy", "rollout"):
        if transfer != "shared_memory" and not plan.workers[role][0].gpus:
            raise UserError(
                f"rollout.weight_transfer: {transfer!r} needs GPUs, and the {role} has none; expected 'shared_memory'"
            )
    found = next(_apart(plan), None) if transfer == "ipc" else None
    if found is not None:
        raise UserError(
            f"rollout.weight_transfer: 'ipc' needs a policy rank on each replica's GPU, but {found}; "
            "expected rollout.replicas <= placement.policy.ranks and shares of at most 1 GPU together, or 'auto'"
        )


def _apart(plan: ResourcePlan) -> Iterator[str]:
    """Yield why a replica's GPU is not a policy rank's; `ipc` reads that rank's memory."""
    policy = {worker.bundles[0]: worker for worker in plan.workers["policy"]}
    for index, replica in enumerate(plan.workers["rollout"]):
        rank = policy.get(replica.bundles[0]) if replica.group == plan.workers["policy"][0].group else None
        if rank is None:
            yield f"replica {index} shares no GPU with a policy rank"
        elif rank.gpus + replica.gpus > 1:
            yield f"replica {index} takes {replica.gpus:g} GPU and the policy {rank.gpus:g}, which need more than one device"
        elif (width := plan.groups[replica.group].bundles[replica.bundles[0]].get("GPU", 0)) > 1:
            yield f"replica {index} and a policy rank may get different ones of the {width} GPUs of their bundle"


def _check_fits(plan: ResourcePlan, resolved: Sequence[_ResolvedDemand], machine: ClusterResources) -> None:
    requested_cpus = sum(bundle["CPU"] for group in plan.groups.values() for bundle in group.bundles)
    requested_gpus = sum(bundle.get("GPU", 0) for group in plan.groups.values() for bundle in group.bundles)
    if requested_cpus <= machine.cpus + 1e-6 and requested_gpus <= machine.gpus + 1e-6:
        return
    parts = ", ".join(f"{part.role} {part.ranks} x ({part.cpus:g} CPU, {part.gpus:g} GPU)" for part in resolved)
    raise UserError(
        f"placement: requested {requested_cpus:g} CPUs and {requested_gpus:g} GPUs ({parts}), "
        f"but the cluster has {machine.cpus:g} CPUs and {machine.gpus:g} GPUs; lower placement.*.cpus/gpus/ranks or add nodes"
    )
