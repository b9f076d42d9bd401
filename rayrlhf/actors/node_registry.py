"""Where each actor was when it last answered a ping, so that an error can say which process on which node to look at.

The watch, on its own thread, writes; errors are put together on the threads that wait.
"""

from rayrlhf.actors.worker import Place

_known: dict[str, Place] = {}


def seen(name: str, place: Place) -> None:
    """Note where an actor answered from."""
    _known[name] = place


def forget(name: str) -> None:
    """An actor is watched no more, or another process will take its name."""
    _known.pop(name, None)


def located(name: str) -> str:
    """An actor with its place, such as `ppo/reward/0 (process 4711 on node 10.0.0.7)`; its name alone before its first ping."""
    place = _known.get(name)
    return f"{name} (process {place.pid} on node {place.address})" if place else name
