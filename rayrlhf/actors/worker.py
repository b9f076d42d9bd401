"""What every actor can do beside its role's work: answer a ping while busy, with the memory it took, and give an address."""

import importlib
import importlib.util
import os
import socket
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, NamedTuple

import ray

from rayrlhf.actors.actor_metrics import ActorMetrics
from rayrlhf.actors.footprint import Footprint, own_footprint


class ProcessLocation(NamedTuple):
    """Where a process runs: its id, the Ray node's id, the node's address; and the memory it took there so far."""

    pid: int
    node: str
    address: str
    footprint: Footprint = Footprint()


class Worker:
    """Base of all actor classes."""

    PRELOADED: ClassVar[Sequence[str]] = ()
    """Modules that the role will need and that take seconds to import."""

    @cached_property
    def actor_metrics(self) -> ActorMetrics:
        """What this actor shows to the cluster."""
        return ActorMetrics.of_this_actor()

    def preload(self) -> None:
        """Import what the role will need while the driver is still reading its data; what is not installed is left out."""
        for name in self.PRELOADED:
            if importlib.util.find_spec(name.partition(".")[0]) is not None:
                importlib.import_module(name)

    @ray.method(concurrency_group="health")
    def ping(self) -> ProcessLocation:
        """Where this process is. Runs on a thread of its own, so that a busy actor still answers."""
        context, footprint = ray.get_runtime_context(), own_footprint()
        self.actor_metrics.peak_memory(footprint.resident)
        return ProcessLocation(os.getpid(), context.get_node_id(), ray.util.get_node_ip_address(), footprint)

    def where(self) -> tuple[str, str]:
        """(Ray node id, node address)."""
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    def rendezvous(self) -> tuple[str, int]:
        """Address and a free port for a process group whose rank 0 is this process."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return ray.util.get_node_ip_address(), int(listener.getsockname()[1])
