"""Base of all actors: preloading of modules, pings, and addresses for process groups."""

import importlib
import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Sequence
from functools import cached_property, wraps
from typing import ClassVar, Concatenate, NamedTuple, ParamSpec, TypeVar

import ray

from rayrlhf.actors.actor_metrics import ActorMetrics
from rayrlhf.actors.footprint import Footprint, own_footprint
from rayrlhf.actors.remote import concurrency_group
from rayrlhf.errors import UserError
from rayrlhf.observe.cuda import find_fault, read_cuda
from rayrlhf.observe.stacks import own_stacks, write_on_signal
from rayrlhf.observe.user_output import UserOutput


class ProcessLocation(NamedTuple):
    """Process id, Ray node id, node address and peak memory of a process."""

    pid: int
    node: str
    address: str
    footprint: Footprint = Footprint()


class Beat(NamedTuple):
    """Location of a process, and lines of user code since the last beat."""

    location: ProcessLocation
    output: list[str]


def assigned_gpus() -> float:
    """Return the GPUs that Ray gave this process; 0 outside of Ray."""
    return float(ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0)) if ray.is_initialized() else 0.0


def check_assigned_gpu() -> None:
    """Check that torch can use the GPUs that Ray gave this process.

    Otherwise it would compute on the CPU without a word.

    Raises:
        UserError: it cannot; names the actor and its node.
    """
    gpus = assigned_gpus()
    fault = find_fault(read_cuda()) if gpus > 0 else None
    if fault is not None:
        name = ray.get_runtime_context().get_actor_name() or "a process"
        node = ray.util.get_node_ip_address()
        raise UserError(f"{name} on node {node}: Ray assigned {gpus:g} GPUs, but {fault.found}; {fault.fix}")


class ModelCheck(NamedTuple):
    """Outcome of the checks on load of an actor's models.

    Attributes:
        line: in words; empty without a model of this package.
        shares_prefixes: common prefixes of samples are computed once.
    """

    line: str = ""
    shares_prefixes: bool = False


class Worker:
    """Base of all actor classes."""

    PRELOADED: ClassVar[Sequence[str]] = ()
    """Modules that the role needs and that take seconds to import."""

    def __init__(self) -> None:
        self._output = UserOutput()
        if ray.is_initialized() and ray.get_runtime_context().get_actor_id():
            self._output.capture()
            write_on_signal()

    @cached_property
    def actor_metrics(self) -> ActorMetrics:
        """Prometheus metrics of this actor."""
        return ActorMetrics.of_this_actor()

    @cached_property
    def shares_gpu(self) -> bool:
        """True if Ray gave this process a part of a GPU."""
        return 0 < assigned_gpus() < 1

    def return_memory(self) -> None:
        """Return freed memory of a shared GPU to the device."""
        torch = sys.modules.get("torch")
        if self.shares_gpu and torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def preload(self) -> None:
        """Import `PRELOADED` while the driver reads its data; skip modules that are not installed."""
        for name in self.PRELOADED:
            if importlib.util.find_spec(name.partition(".")[0]) is not None:
                importlib.import_module(name)

    def load_check(self) -> ModelCheck:
        """Return the outcome of the models' checks on load."""
        return ModelCheck()

    @concurrency_group("health")
    def ping(self) -> ProcessLocation:
        """Return this process's location, on a separate thread, so that a busy actor still responds."""
        context, footprint = ray.get_runtime_context(), own_footprint()
        self.actor_metrics.peak_memory(footprint.resident)
        return ProcessLocation(os.getpid(), context.get_node_id(), ray.util.get_node_ip_address(), footprint)

    @concurrency_group("health")
    def beat(self, last: bool) -> Beat:
        """Respond as `ping`, with the output of user code; `last` includes lines without an end."""
        return Beat(self.ping(), self._output.take(last=last))

    @concurrency_group("health")
    def stacks(self) -> str:
        """Return the stacks of all threads of this process."""
        return own_stacks()

    def rendezvous(self) -> tuple[str, int]:
        """Return this node's address and a free port, for rank 0 of a process group."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return ray.util.get_node_ip_address(), int(listener.getsockname()[1])


Owner = TypeVar("Owner", bound=Worker)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def returns_memory(call: Callable[Concatenate[Owner, Arguments], Result]) -> Callable[Concatenate[Owner, Arguments], Result]:
    """Return freed memory of a shared GPU to the device at a method's end.

    Also at the end of one that fails. Otherwise torch's allocator keeps it for this process, and a replica that wakes up on
    the same GPU finds too little memory.
    """

    @wraps(call)
    def returning(self: Owner, /, *arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        try:
            return call(self, *arguments, **named)
        finally:
            self.return_memory()

    return returning
