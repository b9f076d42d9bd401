"""Going back to the last committed state when a rank of the policy or the critic is lost.

A process group cannot lose a member, and weights without their optimizer are of no use: so the whole role is started anew,
every learning role is brought to the same committed state, and the step is replayed. Prompts that were out are handed out
again, with the same seeds. Committed is, in this order: the copy in the object store (`recovery.snapshot: step`), the newest
durable checkpoint, or the start of the run.
"""

import json
import time
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayTaskError

from rayrlhf.actors.actor_restarter import RecoveryListener
from rayrlhf.actors.pending_calls import track_calls
from rayrlhf.actors.placement import TrainRole
from rayrlhf.actors.rebuild import Rebuilder
from rayrlhf.actors.remote import Ref
from rayrlhf.actors.role_groups import TrainGroup
from rayrlhf.actors.waiting import INFRASTRUCTURE_ERRORS, overrun
from rayrlhf.engines.train.backends.base import StateFiles
from rayrlhf.errors import ActorLostError
from rayrlhf.ppo.checkpoint import LEARNING_ROLES, Checkpointer, load_checkpoint
from rayrlhf.ppo.trainer import PPOTrainer


class _Snapshot(NamedTuple):
    """State of all learning roles after a step. The references are return values, so they outlive the ranks."""

    state: dict[str, Any]
    parts: dict[TrainRole, list[Ref[StateFiles]]]


def lost_role(error: ActorLostError) -> str:
    """Role of the actor that an error names; empty where it names none."""
    return error.actor.split("/")[-2] if error.actor.count("/") >= 2 else ""


class Recovery:
    """Knows the last committed state of a run and how to get back to it.

    Args:
        trainer: the run; its state now is the start of the run.
        checkpointer: knows the durable checkpoints.
        note: receives losses and recoveries.
    """

    def __init__(self, trainer: PPOTrainer, checkpointer: Checkpointer, note: RecoveryListener) -> None:
        self._trainer = trainer
        self._checkpointer = checkpointer
        self._note = note
        self._section = trainer.config.recovery
        self._start = trainer.state()
        self._roles: tuple[TrainRole, ...] = tuple(role for role in LEARNING_ROLES if role in trainer.actor_groups)
        self._snapshot: _Snapshot | None = None
        self._rebuilder = Rebuilder(trainer.fault_tolerance.retry)

    def commit(self) -> None:
        """Take note of a step's end; with `recovery.snapshot: step` keep a copy of the training state."""
        self._rebuilder.step_completed()
        if self._section.snapshot != "step":
            return
        state = json.loads(json.dumps(self._trainer.state()))
        seconds = self._trainer.config.deadlines.update
        parts: dict[TrainRole, list[Ref[StateFiles]]] = {}
        for role in self._roles:
            parts[role] = list(self._trainer.actor_groups[role].snapshot().values())
        for role, pending in parts.items():
            _await_values(self._trainer.actor_groups[role], pending, seconds)
        self._snapshot = _Snapshot(state, parts)

    def restore(self, error: ActorLostError) -> int:
        """Rebuild the role whose rank was lost and go back to the committed state; returns the step it was taken at.

        Raises:
            ActorLostError: recovery is switched off, the actor is none that learns, or rebuilding failed too often in a row.
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
        step = self._trainer.steps_done
        self._note("replayed", error.actor, f"back at step {step}", time.monotonic() - began)
        return step

    def _rebuild(self, lost: list[TrainRole]) -> None:
        """Start the lost roles anew and load the committed state into all of them."""
        actor_groups, seconds = self._trainer.actor_groups, self._trainer.config.deadlines.start
        checkpoint, _ = self._checkpointer.find()
        snapshot = self._usable_snapshot()
        # Without any committed state everybody begins anew.
        for role in lost if snapshot or checkpoint else self._roles:
            self._unmonitor(role)
            actor_groups.restart_gang(role, seconds)
            self._monitor(role)
        if snapshot:
            for role, parts in snapshot.parts.items():
                group = actor_groups[role]
                group.wait(group.load_snapshot(*parts), "restoring the snapshot", seconds)
            self._trainer.load_state(snapshot.state)
        elif checkpoint:
            self._trainer.load_state(load_checkpoint(checkpoint, actor_groups, seconds))
        else:
            self._trainer.load_state(self._start)

    def _usable_snapshot(self) -> _Snapshot | None:
        """The snapshot, unless some of it lay on a node that is gone."""
        if self._snapshot is None:
            return None
        try:
            for parts in self._snapshot.parts.values():
                for part in parts:
                    ray.get(part, timeout=self._trainer.config.deadlines.sync)
        except (*INFRASTRUCTURE_ERRORS, RayTaskError, TimeoutError):
            self._snapshot = None
        return self._snapshot

    def _monitor(self, role: TrainRole) -> None:
        monitor, group = self._trainer.fault_tolerance.monitor, self._trainer.actor_groups[role]
        for name, handle in zip(group.names, group.handles, strict=True):
            if monitor:
                monitor.add(name, handle)

    def _unmonitor(self, role: TrainRole) -> None:
        monitor = self._trainer.fault_tolerance.monitor
        for name in self._trainer.actor_groups[role].names:
            if monitor:
                monitor.remove(name)


def _await_values(group: TrainGroup, pending: list[Ref[StateFiles]], seconds: float) -> None:
    """Wait until values are there, without bringing them into this process."""
    with track_calls("snapshot", dict.fromkeys(group.names, time.monotonic())):
        _, late = ray.wait(pending, num_returns=len(pending), timeout=seconds, fetch_local=False)
    if late:
        raise overrun("snapshot", [group.names[pending.index(ref)] for ref in late], seconds)
    name = group.find_lost()  # a lost rank's value counts as ready, and tells so only when it is read
    if name is not None:
        raise ActorLostError(f"{name} was lost during snapshot", name)
