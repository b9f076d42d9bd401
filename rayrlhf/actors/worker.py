"""Base of all actors: preloading of modules, pings, and addresses for process groups."""

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
from rayrlhf.actors.remote import concurrency_group


class ProcessLocation(NamedTuple):
    """Process id, Ray node id, node address and peak memory of a process."""

    pid: int
    node: str
    address: str
    footprint: Footprint = Footprint()


class Worker:
    """Base of all actor classes."""

    PRELOADED: ClassVar[Sequence[str]] = ()
    """Modules that the role needs and that take seconds to import."""

    @cached_property
    def actor_metrics(self) -> ActorMetrics:
        """Prometheus metrics of this actor."""
        return ActorMetrics.of_this_actor()

    def preload(self) -> None:
        """Import `PRELOADED` while the driver reads its data; skip modules that are not installed."""
        for name in self.PRELOADED:
            if importlib.util.find_spec(name.partition(".")[0]) is not None:
                importlib.import_module(name)

    def load_check(self) -> str:
        """Return the outcome of the models' checks on load, in words.

        Empty for a role without a model of this package.
        """
        return ""

    @concurrency_group("health")
    def ping(self) -> ProcessLocation:
        """Return this process's location, on a separate thread, so that a busy actor still responds."""
        context, footprint = ray.get_runtime_context(), own_footprint()
        self.actor_metrics.peak_memory(footprint.resident)
        return ProcessLocation(os.getpid(), context.get_node_id(), ray.util.get_node_ip_address(), footprint)

    def rendezvous(self) -> tuple[str, int]:
        """Return this node's address and a free port, for rank 0 of a process group."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return ray.util.get_node_ip_address(), int(listener.getsockname()[1])
