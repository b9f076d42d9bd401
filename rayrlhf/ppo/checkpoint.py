"""Durable state of a run, whole or not at all.

A checkpoint is one folder, `checkpoints/step-000010`: `state.json` (step, weight version, data cursor, KL coefficient,
running moments), one sub-folder a learning role, written by its ranks, and last a manifest with the checksum of every file.
Ranks copy their state in memory and write it while training goes on; the folder gets its name when all of it is on the
disk. Whatever has the final name and agrees with its manifest can be resumed from. On several nodes the run folder must be
shared storage.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ray

from rayrlhf.actors.actor_groups import ActorGroups
from rayrlhf.actors.placement import TrainRole
from rayrlhf.actors.remote import PendingCalls, Ref
from rayrlhf.actors.waiting import wait_all
from rayrlhf.config.runtime import CheckpointSection
from rayrlhf.errors import UserError
from rayrlhf.storage.atomic import PendingFolder, remove_leftovers
from rayrlhf.storage.manifest import (
    DamagedError,
    FileRecord,
    Manifest,
    fingerprint_differences,
    read_manifest,
    verify,
    write_hashed,
    write_manifest,
)
from rayrlhf.storage.mirror import Mirror

LEARNING_ROLES: tuple[TrainRole, ...] = ("policy", "critic")
STATE_FILE = "state.json"
_NAME = re.compile(r"step-(\d{6,})")


class Checkpoint(NamedTuple):
    """A checkpoint on disk."""

    step: int
    folder: Path


class _Writing(NamedTuple):
    """A checkpoint on its way: the folder to be, who is writing what, and what the driver has written itself."""

    step: int
    folder: PendingFolder
    calls: Mapping[str, Ref[dict[str, FileRecord]]]
    roles: Sequence[str]
    own: Mapping[str, FileRecord]
    metric: float | None


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Checkpoints of a run folder's `checkpoints/`, oldest first. Temporary folders do not match the name."""
    found = []
    for child in folder.glob("step-*"):
        match = _NAME.fullmatch(child.name)
        if match and child.is_dir():
            found.append(Checkpoint(int(match[1]), child))
    return sorted(found)


def newest_usable(folder: Path, fingerprint: Mapping[str, str]) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that agrees with its manifest, and a line about each newer one that does not.

    Raises:
        UserError: it is of another model or another set-up, or there are checkpoints and all of them are damaged.
    """
    lines: list[str] = []
    found = list_checkpoints(folder)
    for checkpoint in reversed(found):
        try:
            manifest = verify(checkpoint.folder)
        except DamagedError as error:
            lines.append(f"checkpoint {checkpoint.folder} is damaged and not used: {error}")
            continue
        differing = fingerprint_differences(manifest.fingerprint, fingerprint)
        if differing:
            raise UserError(
                f"checkpoint {checkpoint.folder} does not fit this run ({'; '.join(differing[:5])}): "
                "choose another run.name, or remove it"
            )
        return checkpoint, lines
    if found:
        raise UserError(f"{'; '.join(lines)}: remove {folder} to begin anew")
    return None, lines


class Checkpointer:
    """Writes the checkpoints of one run, one at a time.

    Args:
        folder: `checkpoints/` of the run folder, which this process alone writes to.
        actor_groups: the running actors.
        section: how many to keep, and how to write.
        fingerprint: what a run must agree on to load them.
        seconds: deadline of each wait.
        mirror: where every checkpoint is copied to.
    """

    def __init__(
        self,
        folder: Path,
        actor_groups: ActorGroups,
        section: CheckpointSection,
        fingerprint: Mapping[str, str],
        seconds: float,
        mirror: Mirror | None = None,
    ) -> None:
        self._folder = folder
        self._actor_groups = actor_groups
        self._section = section
        self._fingerprint = dict(fingerprint)
        self._seconds = seconds
        self._mirror = mirror
        self._writing: _Writing | None = None
        remove_leftovers(folder)

    def start(self, step: int, state: Mapping[str, Any], metric: float | None = None) -> list[Checkpoint]:
        """Copy the state of all ranks and let them write it; returns what `finish` made of the checkpoint before.

        Args:
            step: PPO steps done.
            state: the driver's part, plain JSON.
            metric: value of `checkpoint.best_metric`.

        Raises:
            UserError: the disk is full or the folder cannot be written; earlier checkpoints stay usable.
            ActorLostError: a rank died.
            DeadlineError: a rank did not copy or write in time.
        """
        done = self.finish()
        groups = [self._actor_groups[role] for role in LEARNING_ROLES if role in self._actor_groups]
        captured = [(group, group.capture_state()) for group in groups]
        for group, pending in captured:
            group.wait(pending, "checkpoint: copying the state", self._seconds)
        with _disk(self._target(step)):
            folder = PendingFolder(self._target(step), if_exists="replace")
        calls: PendingCalls[dict[str, FileRecord]] = {}
        roles: list[str] = []
        own: dict[str, FileRecord] = {}
        self._writing = _Writing(step, folder, calls, roles, own, metric)
        with _disk(folder.path):
            content = dict(state) | {"ranks": {group.role: len(group) for group in groups}}
            own[STATE_FILE] = write_hashed(folder.partial / STATE_FILE, json.dumps(content).encode())
            for group in groups:
                (folder.partial / group.role).mkdir()
                calls.update(group.write_state((folder.partial / group.role).absolute()))
                roles += [group.role] * len(group)
        return done if self._section.asynchronous else done + self.finish()

    def poll(self) -> list[Checkpoint]:
        """Commit the checkpoint that is being written if all ranks are done; what became complete, at most one."""
        if self._writing is None:
            return []
        calls = list(self._writing.calls.values())
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        return self.finish() if len(ready) == len(calls) else []

    def finish(self) -> list[Checkpoint]:
        """Wait for the checkpoint that is being written and commit it; errors as in `start`."""
        if self._writing is None:
            return []
        writing = self._writing
        try:
            parts = wait_all(writing.calls, "checkpoint: writing", self._seconds)
            files = dict(writing.own)
            for role, part in zip(writing.roles, parts, strict=True):
                files |= {f"{role}/{name}": record for name, record in part.items()}
            with _disk(writing.folder.path):
                write_manifest(writing.folder.partial, Manifest(writing.step, self._fingerprint, files, writing.metric))
                writing.folder.commit()
        finally:
            self.abandon()
        kept = self._to_keep()
        if self._mirror:
            self._mirror.push(writing.folder.path, [checkpoint.folder.name for checkpoint in kept])
        for old in list_checkpoints(self._folder):
            if old not in kept:
                shutil.rmtree(old.folder, ignore_errors=True)
        return [Checkpoint(writing.step, writing.folder.path)]

    def mirror_failures(self) -> list[str]:
        """Why copies to the mirror failed since the last call, a line each; never waits."""
        return self._mirror.failures() if self._mirror else []

    def copied(self) -> str | None:
        """Wait for the copy of the newest checkpoint; why there is none, in a line, or None."""
        return self._mirror.wait() if self._mirror else None

    def fetch(self) -> str | None:
        """Bring the mirror's newest checkpoint here if it is newer than all that are; a line about it, or None.

        Raises:
            UserError: the mirror does not answer, or the disk cannot take it.
        """
        names = self._mirror.names() if self._mirror else []
        here = [checkpoint.folder.name for checkpoint in list_checkpoints(self._folder)]
        if not self._mirror or not names or names[-1] in here or (here and names[-1] < here[-1]):
            return None
        self._mirror.fetch(names[-1], self._folder / names[-1])
        return f"checkpoint {names[-1]} brought from {self._mirror.uri}"

    def find(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that this run can go back to, see `newest_usable`."""
        return newest_usable(self._folder, self._fingerprint)

    def abandon(self) -> None:
        """Forget the checkpoint that is being written, because a rank that writes it is lost."""
        if self._writing is not None:
            self._writing.folder.discard()
            self._writing = None

    def _target(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"

    def _to_keep(self) -> list[Checkpoint]:
        found = list_checkpoints(self._folder)
        best = self._best(found)
        return [checkpoint for checkpoint in found if checkpoint in found[-self._section.keep :] or checkpoint == best]

    def _best(self, found: list[Checkpoint]) -> Checkpoint | None:
        if self._section.best_metric is None:
            return None
        sign = 1.0 if self._section.best_mode == "max" else -1.0
        scored = []
        for checkpoint in found:
            try:
                metric = read_manifest(checkpoint.folder).metric
            except DamagedError:
                continue
            if metric is not None:
                scored.append((sign * metric, checkpoint))
        return max(scored)[1] if scored else None


def load_checkpoint(checkpoint: Checkpoint, actor_groups: ActorGroups, seconds: float) -> dict[str, Any]:
    """Bring every learning role back to a checkpoint; returns the driver's state.

    A role may have another number of ranks than it had.
    """
    state: dict[str, Any] = json.loads((checkpoint.folder / STATE_FILE).read_text(encoding="utf-8"))
    groups = [actor_groups[role] for role in LEARNING_ROLES if role in actor_groups]
    loading = []
    for group in groups:
        resized = state["ranks"][group.role] != len(group)
        loading.append((group, group.load_state((checkpoint.folder / group.role).absolute(), resized)))
    for group, pending in loading:
        group.wait(pending, "resume", seconds)
    return state


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turn the disk's refusal into the user's one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write checkpoint {path}: {error.strerror or error}; earlier checkpoints are untouched"
        ) from error
