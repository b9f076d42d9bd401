"""Waits on Ray calls with a deadline and the names of the actors.

Every wait of the driver goes through here. A missed deadline names the call, the actors, their nodes and the time of the call.
A lost actor is named by role and rank. A user's mistake found inside an actor arrives as its one line.

Pending calls are registered for the message about a hanging process. The heartbeat monitor reads them, and writes locations of
processes, from its own thread. An entry is the waiter's own table and is never copied, so that waiting for a thousand processes
costs no more than without it.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from rayrlhf.actors.remote import Ref
from rayrlhf.actors.worker import ProcessLocation
from rayrlhf.errors import ActorLostError, AlarmError, DeadlineError, DeviceMemoryError, UserError
from rayrlhf.storage.atomic import full_disk

Value = TypeVar("Value")
INFRASTRUCTURE_ERRORS = (RayActorError, OutOfMemoryError, NodeDiedError, WorkerCrashedError, ObjectLostError)
"""Ray's errors for a process, a node or an object that is gone, as opposed to a bug in the code that ran there."""


def wait_all(pending: Mapping[str, Ref[Value]], what: str, seconds: float) -> list[Value]:
    """Wait for one result from each named actor.

    Args:
        pending: actor name -> reference to the call's result.
        what: the call in words, for errors ("generate", "policy update").
        seconds: deadline of the whole wait.

    Returns:
        The results in the order of `pending`.

    Raises:
        DeadlineError: an actor did not respond in time.
        ActorLostError: one of the actors died; raised at once, not after the others.
    """
    results = dict(as_completed(pending, what, seconds))
    return [results[name] for name in pending]


def as_completed(pending: Mapping[str, Ref[Value]], what: str, seconds: float) -> Iterator[tuple[str, Value]]:
    """Yield (actor name, result) as calls finish; errors as in `wait_all`."""
    left = dict(pending)
    began = time.monotonic()
    since = dict.fromkeys(left, began)
    with track_calls(what, since):
        while left:
            name = wait_any(left, what, seconds, began + seconds)
            del since[name]
            yield name, fetch(left.pop(name), what, name)


def wait_any(pending: Mapping[str, Ref[object]], what: str, seconds: float, end: float | None = None) -> str:
    """Wait for any call; returns the name of one that has finished.

    Args:
        seconds: deadline of the whole wait, which may have begun earlier.
        end: time of that deadline on the monotonic clock; `seconds` from now if None.

    Raises:
        DeadlineError: none finished in time.
    """
    left = seconds if end is None else end - time.monotonic()
    ready, _ = ray.wait(list(pending.values()), num_returns=1, timeout=max(left, 0.0))
    if not ready:
        raise overrun(what, list(pending), seconds)
    return next(name for name, ref in pending.items() if ref == ready[0])


def fetch(ref: Ref[Value], what: str, name: str) -> Value:
    """Return the result of a finished call, with errors translated."""
    try:
        value: Value = ray.get(ref)
        return value
    except RayTaskError as error:
        if isinstance(error.cause, INFRASTRUCTURE_ERRORS):
            # The process that was to produce the call's input is gone.
            raise ActorLostError(
                f"{name} was lost during {what}: its input is gone: {lost_because(error.cause)}", name
            ) from error
        _raise_cause(error, what, name)
    except INFRASTRUCTURE_ERRORS as error:
        raise ActorLostError(f"{name} was lost during {what}: {lost_because(error)}", name) from error


def lost_because(error: BaseException) -> str:
    """Return Ray's reason in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def overrun(what: str, names: list[str], seconds: float) -> DeadlineError:
    """Return the error for a wait that took longer than its deadline."""
    since = time.strftime("%H:%M:%S", time.localtime(time.time() - seconds))
    late = ", ".join(describe_location(name) for name in sorted(names))
    return DeadlineError(f"{what}: no response from {late} within {seconds:.0f} s (called at {since})")


LESS_MEMORY = {
    "policy": "lower train.micro_batch_tokens, or set model.gradient_checkpointing=true",
    "critic": "lower train.micro_batch_tokens, or set model.gradient_checkpointing=true",
    "reference": "lower train.score_batch_tokens, or set reference.offload=true",
    "teacher": "lower train.score_batch_tokens, or set teacher.offload=true",
    "reward": "set reward.model.offload=true",
    "judge": "lower reward.judge.gpu_memory_utilization",
    "rollout": "lower rollout.gpu_memory_utilization, or set rollout.sleep=true",
}
"""First change to try by the role that ran out of GPU memory."""


def _raise_cause(error: RayTaskError, what: str, name: str) -> NoReturn:
    """Raise our errors with their type and text, bugs with the actor's traceback.

    Lack of GPU memory is one line.
    """
    import torch

    if isinstance(error.cause, torch.OutOfMemoryError):
        held = lost_because(error.cause).partition(" If reserved")[0].rstrip(".")
        mend = LESS_MEMORY.get(name.split("/")[-2] if "/" in name else name, "use fewer or smaller models on this GPU")
        raise DeviceMemoryError(f"{name}: {what}: {held}; {mend}; `rayrlhf plan` shows what fits") from error
    if reason := full_disk(error.cause):
        raise UserError(f"{name}: {what}: {reason}; free some space, then the same command resumes") from error
    if isinstance(error.cause, ActorLostError):
        raise error.cause from error
    if isinstance(error.cause, (UserError, AlarmError)):
        raise type(error.cause)(*error.cause.args) from None
    raise error


_open: list[tuple[str, Mapping[str, float]]] = []


@contextmanager
def track_calls(what: str, since: Mapping[str, float]) -> Iterator[None]:
    """Register a pending call inside the block.

    Args:
        since: actor name -> time of the call on the monotonic clock; names may come and go.
    """
    entry = (what, since)
    _open.append(entry)
    try:
        yield
    finally:
        # By identity: two waits may be equal for a moment.
        _open[:] = [other for other in _open if other is not entry]


def pending_call(name: str) -> str:
    """Return an actor's newest pending call, such as `generate called 12 s ago`, or ''."""
    for what, since in reversed(_open):
        began = since.get(name)
        if began is not None:
            return f"{what} called {time.monotonic() - began:.0f} s ago"
    return ""


def pending_calls() -> dict[str, float]:
    """Return the age in seconds of the oldest open call by name (`generate`)."""
    now = time.monotonic()
    return {what: round(now - min(since.values()), 1) for what, since in list(_open) if since}


_locations: dict[str, ProcessLocation] = {}


def record_location(name: str, location: ProcessLocation) -> None:
    """Record the location that an actor's ping returned."""
    _locations[name] = location


def forget(name: str) -> None:
    """Remove an actor that is no longer monitored or whose name another process takes over."""
    _locations.pop(name, None)


def describe_location(name: str) -> str:
    """Return an actor's name and location, such as `ppo/reward/0 (process 4711 on node 10.0.0.7)`.

    Before its first ping it is the name alone.
    """
    location = _locations.get(name)
    return f"{name} (process {location.pid} on node {location.address})" if location else name
