"""Restores the last committed state when a policy or critic rank is lost.

A process group cannot lose a member, and weights are useless without their optimizer state. So the whole role is restarted,
every learning role loads the same committed state, and the step is replayed. Outstanding prompts are drawn again, with the same
seeds. The committed state is the copy in the object store (`recovery.snapshot: step`), else the newest checkpoint, else the
start of the run.
"""

import json
import time
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayTaskError

from rayrlhf.actors.placement import TrainRole
from rayrlhf.actors.rebuild import Rebuilder, RecoveryListener
from rayrlhf.actors.remote import Ref
from rayrlhf.actors.role_groups import TrainGroup
from rayrlhf.actors.waiting import INFRASTRUCTURE_ERRORS, overrun, track_calls, wait_all
from rayrlhf.engines.train.backends.base import StateFiles
from rayrlhf.errors import ActorLostError
from rayrlhf.ppo.checkpoint import LEARNING_ROLES, Checkpointer, load_checkpoint
from rayrlhf.ppo.step_driver import StepDriver


class _Snapshot(NamedTuple):
    """State of all learning roles after a step, as references that outlive the ranks."""

    state: dict[str, Any]
    parts: dict[TrainRole, list[Ref[StateFiles]]]


def lost_role(error: ActorLostError) -> str:
    """Return the role of the actor that an error names, or an empty string."""
    return error.actor.split("/")[-2] if error.actor.count("/") >= 2 else ""


class Recovery:
    """Keeps the last committed state of a run and restores it.

    Args:
        driver: the run; its state now is the start of the run.
        checkpointer: finds the durable checkpoints.
        note: receives losses and recoveries.
    """

    def __init__(self, driver: StepDriver, checkpointer: Checkpointer, note: RecoveryListener) -> None:
        self._driver = driver
        self._checkpointer = checkpointer
        self._note = note
        self._section = driver.config.recovery
        self._start = driver.state()
        self._roles: tuple[TrainRole, ...] = tuple(role for role in LEARNING_ROLES if role in driver.actor_groups)
        self._snapshot: _Snapshot | None = None
        self._rebuilder = Rebuilder(driver.fault_tolerance.retry)

    def commit(self) -> None:
        """Record a completed step; `recovery.snapshot: step` copies the training state."""
        self._rebuilder.step_completed()
        if self._section.snapshot != "step":
            return
        state = json.loads(json.dumps(self._driver.state()))
        seconds = self._driver.config.deadlines.update
        parts: dict[TrainRole, list[Ref[StateFiles]]] = {}
        for role in self._roles:
            parts[role] = list(self._driver.actor_groups[role].snapshot().values())
        for role, pending in parts.items():
            _await_values(self._driver.actor_groups[role], pending, seconds)
        self._snapshot = _Snapshot(state, parts)

    def restore(self, error: ActorLostError) -> int:
        """Rebuild the lost role and restore the committed state; returns its step.

        Raises:
            ActorLostError: recovery is off, the actor has no learning role, or rebuilding failed too often in a row.
        """
        role = lost_role(error)
        if not self._section.enabled or role not in self._roles:
            raise error
        began = time.monotonic()
        self._note("lost", error.actor, str(error), 0.0)
        self._checkpointer.abandon()
        lost: set[str] = set()

        def rebuild(latest: ActorLostError) -> None:
            lost.add(lost_role(latest))
            self._rebuild([known for known in self._roles if known in lost])

        self._rebuilder.rebuild_with_backoff(error, rebuild)
        step = self._driver.steps_done
        self._note("replayed", error.actor, f"back at step {step}", time.monotonic() - began)
        return step

    def _rebuild(self, lost: list[TrainRole]) -> None:
        """Restart the lost roles and load the committed state into all learning roles."""
        actor_groups, seconds = self._driver.actor_groups, self._driver.config.deadlines.start
        checkpoint, _ = self._checkpointer.find()
        snapshot = self._usable_snapshot()
        # Without a committed state all roles restart.
        for role in lost if snapshot or checkpoint else self._roles:
            actor_groups.replace(role, range(len(actor_groups[role])))
            self._monitor(role, seconds)
            wait_all(actor_groups.build_gang(role, seconds), f"rebuilding the {role}", seconds)
            self._monitor(role)
        if snapshot:
            for role, parts in snapshot.parts.items():
                group = actor_groups[role]
                group.wait(group.load_snapshot(*parts), "restoring the snapshot", seconds)
            self._driver.load_state(snapshot.state)
        elif checkpoint:
            self._driver.load_state(load_checkpoint(checkpoint, actor_groups, seconds))
        else:
            self._driver.load_state(self._start)

    def _usable_snapshot(self) -> _Snapshot | None:
        """Return the snapshot, unless part of it was on a lost node."""
        if self._snapshot is None:
            return None
        try:
            for parts in self._snapshot.parts.values():
                for part in parts:
                    ray.get(part, timeout=self._driver.config.deadlines.sync)
        except (*INFRASTRUCTURE_ERRORS, RayTaskError, TimeoutError):
            self._snapshot = None
        return self._snapshot

    def _monitor(self, role: TrainRole, loading_seconds: float = 0.0) -> None:
        monitor, group = self._driver.fault_tolerance.monitor, self._driver.actor_groups[role]
        for name, handle in zip(group.names, group.handles, strict=True):
            if monitor:
                monitor.add(name, handle, loading_seconds)


def _await_values(group: TrainGroup, pending: list[Ref[StateFiles]], seconds: float) -> None:
    """Wait until values exist, without fetching them into this process."""
    with track_calls("snapshot", dict.fromkeys(group.names, time.monotonic())):
        _, late = ray.wait(pending, num_returns=len(pending), timeout=seconds, fetch_local=False)
    if late:
        raise overrun("snapshot", [group.names[pending.index(ref)] for ref in late], seconds)
    name = group.find_lost()  # the value of a lost rank counts as ready and fails only when read
    if name is not None:
        raise ActorLostError(f"{name} was lost during snapshot", name)
