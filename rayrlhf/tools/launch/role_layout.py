"""Predicted placement of processes on nodes and GPUs, as Ray's scheduler packs them.

Placement groups are created in the order in which a run requests them. Ray fills one node before the next (PACK), and keeps a
STRICT_PACK group on one node; on an otherwise idle cluster this equals first fit over the nodes in order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rayrlhf.actors.placement import ClusterResources, GroupPlan, ResourcePlan, Role
from rayrlhf.errors import UserError

_LITTLE = 1e-6


@dataclass(frozen=True, slots=True)
class Place:
    """Placement of one process.

    Attributes:
        rank: its rank in the role; the processes of a replica over several nodes have the same.
        node: index of its node.
        devices: indices of its GPUs on the node; empty on a CPU.
    """

    role: Role
    rank: int
    node: int
    devices: tuple[int, ...]


class _Node:
    """Free resources of one node."""

    def __init__(self, cpus: float, gpus: float) -> None:
        self.cpus = cpus
        self.devices = [1.0] * int(gpus)
        self.labels: Mapping[str, str] | None = None

    def take(self, bundle_cpus: float, bundle_gpus: float) -> tuple[int, ...] | None:
        """Reserve a bundle; returns its devices, or None if it does not fit."""
        if bundle_cpus > self.cpus + _LITTLE:
            return None
        if bundle_gpus >= 1:
            found = [index for index, left in enumerate(self.devices) if left > 1 - _LITTLE][: round(bundle_gpus)]
            if len(found) < round(bundle_gpus):
                return None
        elif bundle_gpus > 0:
            found = [index for index, left in enumerate(self.devices) if left >= bundle_gpus - _LITTLE][:1]
            if not found:
                return None
        else:
            found = []
        self.cpus -= bundle_cpus
        for index in found:
            self.devices[index] -= min(bundle_gpus, 1.0)
        return tuple(found)

    def may_hold(self, labels: Mapping[str, str]) -> bool:
        """Return True if the labels match; the first labeled group defines a node's labels."""
        return not labels or self.labels in (None, labels)

    def copy(self) -> "_Node":
        """Return a copy with the same free resources and labels."""
        twin = _Node(self.cpus, 0)
        twin.devices = list(self.devices)
        twin.labels = self.labels
        return twin


def lay_out(plan: ResourcePlan, machine: ClusterResources) -> tuple[Place, ...]:
    """Place all processes of a run on the nodes of an otherwise idle cluster.

    Raises:
        UserError: a placement group does not fit; names the request and the free resources.
    """
    nodes = [_Node(cpus, gpus) for cpus, gpus in zip(machine.node_cpus, machine.node_gpus, strict=True)]
    granted = {name: _grant(name, group, nodes) for name, group in plan.groups.items()}
    used: dict[tuple[int, int], float] = {}
    places = []
    for role, workers in plan.workers.items():
        for rank, worker in enumerate(workers):
            for node, offered in (granted[worker.group][index] for index in worker.bundles):
                places.append(Place(role, rank, node, tuple(_devices(worker.gpus, node, offered, used))))
    return tuple(places)


def _grant(name: str, group: GroupPlan, nodes: list[_Node]) -> list[tuple[int, tuple[int, ...]]]:
    """Reserve all bundles of a group; returns node and devices of each."""
    wanted = [(bundle.get("CPU", 0.0), bundle.get("GPU", 0.0)) for bundle in group.bundles]
    for index, node in enumerate(nodes):
        if not node.may_hold(group.labels):
            continue
        trial = node.copy()
        trial.labels = group.labels or node.labels
        taken = [trial.take(*bundle) for bundle in wanted]
        if all(devices is not None for devices in taken):
            nodes[index] = trial
            return [(index, devices) for devices in taken if devices is not None]
    if group.strategy == "PACK":
        found = [_first(nodes, bundle, group.labels) for bundle in wanted]
        if all(place is not None for place in found):
            return [place for place in found if place is not None]
    largest = max(wanted, key=lambda bundle: (bundle[1], bundle[0]))
    together = " on one node" if group.strategy == "STRICT_PACK" else ""
    left = "; ".join(f"node {index}: {node.cpus:g} CPUs, {sum(node.devices):g} GPUs" for index, node in enumerate(nodes))
    raise UserError(
        f"placement group {name!r}: requested {len(wanted)} times up to {largest[0]:g} CPUs and {largest[1]:g} GPUs"
        f"{together}, available: {left}"
    )


def _first(
    nodes: Sequence[_Node], bundle: tuple[float, float], labels: Mapping[str, str]
) -> tuple[int, tuple[int, ...]] | None:
    for index, node in enumerate(nodes):
        devices = node.take(*bundle) if node.may_hold(labels) else None
        if devices is not None:
            node.labels = labels or node.labels
            return index, devices
    return None


def _devices(gpus: float, node: int, offered: Sequence[int], used: dict[tuple[int, int], float]) -> list[int]:
    """Return a process's devices of a bundle, whole ones or a share of one."""
    if gpus <= 0:
        return []
    chosen: list[int] = []
    left = gpus
    for device in offered:
        share = min(left, 1.0)
        if used.get((node, device), 0.0) + share <= 1 + _LITTLE and left > _LITTLE:
            used[(node, device)] = used.get((node, device), 0.0) + share
            chosen.append(device)
            left -= share
    return chosen
