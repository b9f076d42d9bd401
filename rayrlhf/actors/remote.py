"""Typed calls on Ray actors.

A call names its method by the function object of the actor class, as in `remote_call(handle, TrainActor.update, batch, plan,
objective)`. A type checker then sees the arguments and the result, and an editor can follow the call into the actor. Ray's own
types are not followed, so `Handle` and `Ref` are declared here; at run time they are Ray's objects.
"""

from collections.abc import Callable, Generator, Iterator
from typing import Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar, cast

import ray

Actor = TypeVar("Actor")
Actor_co = TypeVar("Actor_co", covariant=True)
Value = TypeVar("Value")
Value_co = TypeVar("Value_co", covariant=True)
Function = TypeVar("Function", bound=Callable[..., object])
Arguments = ParamSpec("Arguments")


class Ref(Protocol[Value_co]):
    """Reference to a value in the object store (`ray.ObjectRef`)."""

    def __await__(self) -> Generator[object, None, Value_co]:
        """Wait for the value."""


class ActorId(Protocol):
    """Ray's id of an actor's process."""

    def hex(self) -> str:
        """Return the id in hexadecimal digits."""


class Handle(Protocol[Actor_co]):
    """Handle of a running actor of one class (`ray.actor.ActorHandle`)."""

    @property
    def _ray_actor_id(self) -> ActorId:
        """Id of the process; a restarted actor has another one."""


PendingCalls: TypeAlias = dict[str, Ref[Value]]
"""Actor name -> reference to the result of a call that may not have finished."""


def remote_call(
    handle: Handle[Actor],
    method: Callable[Concatenate[Actor, Arguments], Value],
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> Ref[Value]:
    """Call a method of an actor; returns without waiting."""
    return cast(Ref[Value], getattr(handle, method.__name__).remote(*args, **kwargs))


def remote_stream(
    handle: Handle[Actor],
    method: Callable[Concatenate[Actor, Arguments], Iterator[Value]],
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> Iterator[Ref[Value]]:
    """Call a `streaming` method of an actor; yields a reference for each value.

    `ray.wait` accepts the iterator and waits for its next value.
    """
    return cast(Iterator[Ref[Value]], getattr(handle, method.__name__).remote(*args, **kwargs))


def put(value: Value) -> Ref[Value]:
    """Copy a value to the object store."""
    return cast(Ref[Value], ray.put(value))


def as_argument(ref: Ref[Value]) -> Value:
    """Type a reference as its value: Ray resolves references among a call's arguments."""
    return cast(Value, ref)


def streaming(function: Function) -> Function:
    """Mark a generator method whose values are delivered one by one; see `remote_stream`."""
    return cast(Function, ray.method(num_returns="streaming")(function))


def concurrency_group(name: str) -> Callable[[Function], Function]:
    """Run a method on its own thread, in parallel with the actor's other calls."""
    return cast(Callable[[Function], Function], ray.method(concurrency_group=name))
