"""Loading of a run's models; processes lost meanwhile are replaced."""

import time
from collections.abc import Sequence

from ray.exceptions import RayTaskError

from rayrlhf.actors.actor_groups import ActorGroups
from rayrlhf.actors.health import RetryPolicy
from rayrlhf.actors.heartbeat import HeartbeatMonitor
from rayrlhf.actors.placement import Role, building_order
from rayrlhf.actors.rebuild import Rebuilder, RecoveryListener
from rayrlhf.actors.remote import PendingCalls
from rayrlhf.actors.waiting import fetch, wait_any
from rayrlhf.errors import ActorLostError, DeadlineError

_CALL = "start"


def load_models(
    actor_groups: ActorGroups,
    seconds: float,
    retry: RetryPolicy | None = None,
    listener: RecoveryListener = lambda *_: None,
    monitor: HeartbeatMonitor | None = None,
) -> dict[str, str]:
    """Load all models; returns the outcomes of their checks by role.

    They load in parallel as far as `building_order` allows: mostly reading and importing, which overlap well even on two cores.

    Args:
        seconds: deadline, counted from the start and from every loss.
        retry: bounds of the replacements; None raises at the first loss.
        listener: receives losses and recoveries.
        monitor: kills processes that are stopped, which then count as lost.

    Raises:
        UserError: a role refuses its spec.
        DeadlineError: a role was not ready in time.
        ActorLostError: a process was lost too often.
    """
    checks: dict[str, str] = {}
    for roles in building_order({role: actor_groups.workers[role] for role in actor_groups.groups}):
        checks |= _Loading(actor_groups, seconds, retry, listener, monitor).load(roles)
    return checks


class _Loading:
    def __init__(
        self,
        actor_groups: ActorGroups,
        seconds: float,
        retry: RetryPolicy | None,
        listener: RecoveryListener,
        monitor: HeartbeatMonitor | None,
    ) -> None:
        self._actor_groups = actor_groups
        self._seconds = seconds
        self._retry = retry
        self._listener = listener
        self._monitor = monitor
        self._calls: PendingCalls[None] = {}
        self._places: dict[str, tuple[Role, int]] = {}
        self._rebuilders: dict[str, Rebuilder] = {}
        self._lost_at: dict[str, float] = {}

    def load(self, roles: Sequence[Role]) -> dict[str, str]:
        for role in roles:
            for rank, name in enumerate(self._actor_groups[role].names):
                self._places[name] = role, rank
        for name, (role, rank) in self._places.items():
            if rank == 0 or not _is_gang(role):
                try:
                    self._start(role, rank, again=False)
                except ActorLostError as error:
                    self._replace(name, error)
        while True:
            self._finish_calls()
            try:
                return self._actor_groups.load_checks(roles, self._seconds)
            except ActorLostError as error:
                self._replace(error.actor, error)

    def _finish_calls(self) -> None:
        end = time.monotonic() + self._seconds
        while self._calls:
            try:
                name = wait_any(self._calls, _CALL, self._seconds, end)
            except DeadlineError as error:
                raise DeadlineError(f"{error}; is the model still downloading, or the machine short of memory?") from error
            try:
                self._finish(name)
            except ActorLostError as error:
                self._replace(name, error)
                end = time.monotonic() + self._seconds

    def _start(self, role: Role, rank: int, again: bool) -> None:
        """Begin to load one process, or all of a role in training."""
        groups = self._actor_groups
        ranks = range(len(groups[role].names)) if _is_gang(role) else (rank,)
        if again:
            groups.replace(role, ranks)
        if self._monitor is not None:  # also while rank 0 of a gang is asked for its address
            for one in ranks:
                self._monitor.add(groups[role].names[one], groups[role].handles[one], self._seconds)
        if role == "policy" or role == "critic":
            self._calls |= groups.build_gang(role, self._seconds)
        else:
            self._calls[groups[role].names[rank]] = groups.build_rank(role, rank)

    def _finish(self, name: str) -> None:
        """Take the result of a process that has its model, or raise its error."""
        role, _ = self._places[name]
        try:
            fetch(self._calls[name], _CALL, name)
        except RayTaskError as error:
            lost = self._actor_groups[role].find_lost() if _is_gang(role) else None  # the others of a group fail first
            if lost is None:
                raise
            raise ActorLostError(f"{lost} was lost during {_CALL}", lost) from error
        del self._calls[name]
        if name in self._lost_at:
            self._listener("recovered", name, "", time.monotonic() - self._lost_at.pop(name))

    def _replace(self, name: str, error: ActorLostError) -> None:
        """Replace a lost process, or all of its role in training."""
        if self._retry is None:
            raise error
        role, rank = self._places[name]
        members = self._actor_groups[role].names if _is_gang(role) else (name,)
        for member in members:
            self._calls.pop(member, None)
        lost = error.actor if error.actor in members else name
        self._listener("lost", lost, str(error), 0.0)
        self._lost_at.setdefault(lost, time.monotonic())
        rebuilder = self._rebuilders.setdefault(members[0], Rebuilder(self._retry))
        rebuilder.rebuild_with_backoff(ActorLostError(str(error), lost), lambda _: self._start(role, rank, again=True))


def _is_gang(role: Role) -> bool:
    return role in ("policy", "critic")
