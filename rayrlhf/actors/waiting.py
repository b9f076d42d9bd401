"""Waiting on Ray with a deadline and a name.

Every wait of the driver goes through here, so that an overrun says what was asked, of whom, where and since when, a lost
actor is named by role and rank, and a user's mistake that surfaced inside an actor arrives as the one line it is.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from rayrlhf.actors.node_registry import describe_location
from rayrlhf.actors.pending_calls import track_calls
from rayrlhf.errors import ActorLostError, AlarmError, DeadlineError, UserError

Key = TypeVar("Key")
INFRASTRUCTURE_ERRORS = (RayActorError, OutOfMemoryError, NodeDiedError, WorkerCrashedError, ObjectLostError)
"""What Ray raises when a process, a node or an object is gone, as opposed to a bug in the code that ran there."""


def wait_all(pending: Mapping[str, ray.ObjectRef], what: str, seconds: float) -> list[Any]:
    """Wait for one answer from each named actor.

    Args:
        pending: actor name -> the call's object reference.
        what: the call in words, for errors ("generate", "policy update").
        seconds: deadline of the whole wait.

    Returns:
        The answers in the order of `pending`.

    Raises:
        DeadlineError: not all answered in time.
        ActorLostError: one of the actors died; raised at once, not after the others.
    """
    answers = dict(as_completed(pending, what, seconds))
    return [answers[name] for name in pending]


def as_completed(pending: Mapping[str, ray.ObjectRef], what: str, seconds: float) -> Iterator[tuple[str, Any]]:
    """Yield (actor name, answer) as answers come; errors as in `wait_all`."""
    left = dict(pending)
    began = time.monotonic()
    since = dict.fromkeys(left, began)
    with track_calls(what, since):
        while left:
            name = wait_any(left, what, seconds, began + seconds)
            del since[name]
            yield name, fetch(left.pop(name), what, name)


def wait_any(pending: Mapping[str, ray.ObjectRef], what: str, seconds: float, end: float | None = None) -> str:
    """The name of a call that has finished; `end` (monotonic clock) is when a longer wait's deadline of `seconds` is over.

    Raises:
        DeadlineError: none finished in time.
    """
    left = seconds if end is None else end - time.monotonic()
    ready, _ = ray.wait(list(pending.values()), num_returns=1, timeout=max(left, 0.0))
    if not ready:
        raise overrun(what, list(pending), seconds)
    return next(name for name, ref in pending.items() if ref == ready[0])


def fetch(ref: ray.ObjectRef, what: str, name: str) -> Any:
    """The value of a finished call, with errors translated."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, INFRASTRUCTURE_ERRORS):
            # The call's input was to come from a process that is gone.
            raise ActorLostError(
                f"{name} was lost during {what}: its input is gone: {lost_because(error.cause)}", name
            ) from error
        _raise_cause(error)
    except INFRASTRUCTURE_ERRORS as error:
        raise ActorLostError(f"{name} was lost during {what}: {lost_because(error)}", name) from error


def lost_because(error: BaseException) -> str:
    """Ray's reason in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def overrun(what: str, names: list[str], seconds: float) -> DeadlineError:
    """The error for a wait that took longer than its deadline."""
    since = time.strftime("%H:%M:%S", time.localtime(time.time() - seconds))
    late = ", ".join(describe_location(name) for name in sorted(names))
    return DeadlineError(f"{what}: no answer from {late} within {seconds:.0f} s (asked at {since})")


def _raise_cause(error: RayTaskError) -> NoReturn:
    """A user's mistake, an alarm or the loss that an actor saw keeps its type and text; a bug keeps the actor's traceback."""
    if isinstance(error.cause, ActorLostError):
        raise error.cause from error
    if isinstance(error.cause, (UserError, AlarmError)):
        raise type(error.cause)(*error.cause.args) from None
    raise error
