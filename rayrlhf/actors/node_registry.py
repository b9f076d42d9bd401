"""Where each actor was when it last answered a ping, so that an error can say which process on which node to look at.

The watch, on its own thread, writes; errors are put together on the threads that wait.
"""

from rayrlhf.actors.worker import ProcessLocation

_known: dict[str, ProcessLocation] = {}


def record_location(name: str, location: ProcessLocation) -> None:
    """Note where an actor answered from."""
    _known[name] = location


def forget(name: str) -> None:
    """An actor is watched no more, or another process will take its name."""
    _known.pop(name, None)


def describe_location(name: str) -> str:
    """An actor with its place, such as `ppo/reward/0 (process 4711 on node 10.0.0.7)`; its name alone before its first ping."""
    location = _known.get(name)
    return f"{name} (process {location.pid} on node {location.address})" if location else name
