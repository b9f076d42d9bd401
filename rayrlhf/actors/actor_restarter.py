"""Restarts of reward, judge, reference and teacher processes.

They keep no state, so their calls are repeated on the new process. A new process that finds too little memory on its device is
also restarted.
"""

import time

from rayrlhf.actors.actor_groups import ActorGroups
from rayrlhf.actors.health import RetryPolicy
from rayrlhf.actors.heartbeat import HeartbeatMonitor
from rayrlhf.actors.placement import StatelessRole
from rayrlhf.actors.rebuild import Rebuilder, RecoveryListener
from rayrlhf.actors.remote import Handle
from rayrlhf.actors.waiting import wait_all
from rayrlhf.actors.worker import Worker
from rayrlhf.errors import ActorLostError


class ActorRestarter:
    """Replaces lost processes, a bounded number of times in a row.

    Args:
        build_seconds: maximum time of one rebuild.
        monitor: pings the processes; None for no pings.
        listener: receives losses and recoveries.
        enabled: False raises at the first loss.
    """

    def __init__(
        self,
        actor_groups: ActorGroups,
        retry: RetryPolicy,
        build_seconds: float,
        monitor: HeartbeatMonitor | None = None,
        listener: RecoveryListener = lambda *_: None,
        enabled: bool = True,
    ) -> None:
        self._actor_groups = actor_groups
        self._retry = retry
        self._build_seconds = build_seconds
        self._monitor = monitor
        self._listener = listener
        self._enabled = enabled
        self._rebuilders: dict[str, Rebuilder] = {}

    def restart_lost(self, role: StatelessRole, rank: int, lost: Handle[Worker], error: ActorLostError) -> Handle[Worker]:
        """Replace the process `lost`; returns the new handle once the model is loaded.

        Several calls may find the same process gone: only the first of them replaces it.

        Raises:
            ActorLostError: recovery is switched off, or the process was lost too often in a row.
        """
        if not self._enabled:
            raise error
        group = self._actor_groups[role]
        if group.handles[rank] is not lost:
            return group.handles[rank]
        name, began = group.names[rank], time.monotonic()
        self._listener("lost", name, str(error), 0.0)
        if self._monitor:
            self._monitor.remove(name)

        def rebuild(_: ActorLostError) -> None:
            building = self._actor_groups.restart(role, rank)
            if self._monitor:
                self._monitor.add(name, self._actor_groups[role].handles[rank], self._build_seconds)
            wait_all({name: building}, "rebuild", self._build_seconds)

        named = error if error.actor == name else ActorLostError(str(error), name)
        self._rebuilders.setdefault(name, Rebuilder(self._retry)).rebuild_with_backoff(named, rebuild)
        handle = self._actor_groups[role].handles[rank]
        if self._monitor:
            self._monitor.add(name, handle)
        self._listener("recovered", name, "", time.monotonic() - began)
        return handle

    def step_completed(self) -> None:
        """Reset the counts of rebuilds in a row."""
        for rebuilder in self._rebuilders.values():
            rebuilder.step_completed()
