"""Checkpoint manifests: every file with its size and SHA-256, and a configuration fingerprint.

The manifest is written last, when all files are on the disk. Hashing the files against it detects checkpoints that were
interrupted by a crash, truncated by a full disk, or corrupted by a bad one.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rayrlhf.storage.atomic import write_atomically

FORMAT = 1
"""Version of the layout of a checkpoint folder."""
FILE_NAME = "manifest.json"


class DamagedError(Exception):
    """A folder that does not match its manifest; names the file and the difference."""


class FileRecord(NamedTuple):
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


class Manifest(NamedTuple):
    """Content of a checkpoint folder.

    Attributes:
        step: completed PPO steps.
        fingerprint: dotted key -> text, settings that a run must share to load the state.
        files: path relative to the folder -> record, for all files except the manifest.
        metric: value of the metric that ranks checkpoints; None without one.
    """

    step: int
    fingerprint: Mapping[str, str]
    files: Mapping[str, FileRecord]
    metric: float | None = None


def write_hashed(path: Path, content: bytes | memoryview) -> FileRecord:
    """Write a file durably; returns the record of the intended content.

    A disk that stores something else is detected later.

    Raises:
        OSError: the disk is full or not writable.
    """
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def record_file(path: Path) -> FileRecord:
    """Return the record of a file on the disk.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(file.tell(), digest)


def write_manifest(folder: Path, manifest: Manifest, name: str = FILE_NAME) -> None:
    """Write the manifest, with a checksum of itself. Call last."""
    body = {
        "format": FORMAT,
        "step": manifest.step,
        "metric": manifest.metric,
        "fingerprint": dict(manifest.fingerprint),
        "files": {name: list(record) for name, record in sorted(manifest.files.items())},
    }
    write_atomically(folder / name, json.dumps(body | {"sha256": _digest(body)}, indent=1))


def read_manifest(folder: Path, name: str = FILE_NAME) -> Manifest:
    """Read a folder's manifest.

    Raises:
        DamagedError: it is missing, was changed, or has an unknown layout.
    """
    try:
        body = json.loads((folder / name).read_bytes())
        claimed = body.pop("sha256")
        if claimed != _digest(body):
            raise DamagedError(f"{name}: its own checksum does not match")
        if body["format"] != FORMAT:
            raise DamagedError(f"{name}: format {body['format']}, expected {FORMAT}")
        files = {path: FileRecord(*record) for path, record in body["files"].items()}
        return Manifest(body["step"], body["fingerprint"], files, body["metric"])
    except OSError as error:
        raise DamagedError(f"{name}: {error.strerror or error}") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedError(f"{name}: not a manifest") from error


def verify(folder: Path, name: str = FILE_NAME) -> Manifest:
    """Read the manifest and hash every file it names.

    Raises:
        DamagedError: names the first file that is missing, truncated or changed.
    """
    manifest = read_manifest(folder, name)
    for path, record in manifest.files.items():
        try:
            size, digest = record_file(folder / path)
        except OSError as error:
            raise DamagedError(f"{path}: {error.strerror or error}") from error
        if size != record.size:
            raise DamagedError(f"{path}: {size} bytes, expected {record.size}")
        if digest != record.sha256:
            raise DamagedError(f"{path}: its SHA-256 differs from the manifest's")
    return manifest


def fingerprint_differences(stored: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Return `key: stored -> wanted` for each key in which two fingerprints differ."""
    keys = dict.fromkeys([*stored, *wanted])
    return [
        f"{key}: {stored.get(key, 'absent')} -> {wanted.get(key, 'absent')}"
        for key in keys
        if stored.get(key) != wanted.get(key)
    ]


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
