"""Durable checkpoints of a run, each complete or absent.

A checkpoint is one folder, `checkpoints/step-000010`: `state.json` (step, weight version, data cursor, KL coefficient,
running moments), one subfolder per learning role, written by its ranks, and last a manifest with the checksum of every file.
Ranks copy their state in memory and write it while training continues. The folder gets its final name when all of it is on
disk; a folder with the final name that matches its manifest can be resumed from. On several nodes the run folder must be on
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
    """A checkpoint that is being written: its folder, pending calls, and the driver's own files."""

    step: int
    folder: PendingFolder
    calls: Mapping[str, Ref[dict[str, FileRecord]]]
    roles: Sequence[str]
    own: Mapping[str, FileRecord]
    metric: float | None


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the checkpoints in `checkpoints/`, oldest first, without temporary folders."""
    found = []
    for child in folder.glob("step-*"):
        match = _NAME.fullmatch(child.name)
        if match and child.is_dir():
            found.append(Checkpoint(int(match[1]), child))
    return sorted(found)


def newest_usable(folder: Path, fingerprint: Mapping[str, str]) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest undamaged checkpoint, and a line about each newer damaged one.

    Raises:
        UserError: it is of another model or setup, or all checkpoints are damaged.
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
        raise UserError(f"{'; '.join(lines)}: remove {folder} to start over")
    return None, lines


def _is_whole(folder: Path) -> bool:
    try:
        verify(folder)
    except DamagedError:
        return False
    return True


class Checkpointer:
    """Writes the checkpoints of one run, one at a time.

    Args:
        folder: `checkpoints/` of the run folder; no other process writes to it.
        section: how many to keep, and how to write them.
        fingerprint: settings on which a run must agree to load them.
        seconds: deadline of each wait.
        mirror: storage that every checkpoint is copied to.
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
        """Copy the state of all ranks and start writing; returns the previous checkpoint, now complete.

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
        with _disk(self.folder_of(step)):
            folder = PendingFolder(self.folder_of(step), if_exists="replace")
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
        """Commit the current checkpoint if all ranks have written it; returns it then."""
        if self._writing is None:
            return []
        calls = list(self._writing.calls.values())
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        return self.finish() if len(ready) == len(calls) else []

    def finish(self) -> list[Checkpoint]:
        """Wait for the current checkpoint and commit it; errors as in `start`."""
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
        """Return a line per failed copy to the mirror since the last call."""
        return self._mirror.failures() if self._mirror else []

    def copied(self) -> str | None:
        """Wait for the copy of the newest checkpoint; returns the reason if it failed."""
        return self._mirror.wait() if self._mirror else None

    def fetch(self) -> list[str]:
        """Fetch the mirror's newest whole checkpoint, unless one here is as new; returns lines.

        Raises:
            UserError: the mirror is unreachable, or the disk is full.
        """
        lines: list[str] = []
        if not self._mirror or not (names := self._mirror.names()):
            return lines
        here = reversed(list_checkpoints(self._folder))
        newest = next((checkpoint.folder.name for checkpoint in here if _is_whole(checkpoint.folder)), "")
        for name in sorted((name for name in names if name > newest), reverse=True):
            self._mirror.fetch(name, self._folder / name)
            if _is_whole(self._folder / name):
                return [*lines, f"checkpoint {name} fetched from {self._mirror.uri}"]
            shutil.rmtree(self._folder / name)
            lines.append(f"checkpoint {name} in {self._mirror.uri} is damaged and not used")
        return lines

    def find(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest usable checkpoint, see `newest_usable`."""
        return newest_usable(self._folder, self._fingerprint)

    def abandon(self) -> None:
        """Discard the current checkpoint, because a rank that writes it is lost."""
        if self._writing is not None:
            self._writing.folder.discard()
            self._writing = None

    def folder_of(self, step: int) -> Path:
        """Folder of a step's checkpoint."""
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
    """Load a checkpoint into every learning role; returns the driver's state.

    A role may have another number of ranks than at the time of the checkpoint.
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
    """Turn an error of the disk into a one-line `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write checkpoint {path}: {error.strerror or error}; earlier checkpoints are untouched"
        ) from error
