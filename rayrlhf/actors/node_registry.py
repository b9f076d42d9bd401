"""Registry of each actor's process and node, for error messages.

The heartbeat monitor writes from its own thread; errors are formatted on the threads that wait.
"""

from rayrlhf.actors.worker import ProcessLocation

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
