"""Checksums of a tuning run's checkpoints, and the newest whole one.

Every worker adds a manifest of its files. Before Ray Train starts, the driver verifies the newest checkpoint and removes
damaged ones from Ray Train's list, which always continues from its last entry.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from rayrlhf.errors import UserError
from rayrlhf.storage.atomic import write_atomically
from rayrlhf.storage.manifest import DamagedError, Manifest, record_file, verify, write_manifest
from rayrlhf.storage.notes import read_note, reading
from rayrlhf.tuning.data_plan import STATE_FILE, TRAIN_NAME

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of checkpoints, in their folder."""


def seal(folder: Path, step: int, rank: int) -> None:
    """Add the manifest of one worker's files to its part of a checkpoint."""
    files = {str(path.relative_to(folder)): record_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    write_manifest(folder, Manifest(step, {}, files), _manifest(rank))


def drop_damaged(folder: Path) -> list[str]:
    """Remove damaged checkpoints behind the newest whole one; returns lines.

    Args:
        folder: the run folder.

    Raises:
        UserError: all checkpoints are damaged.
    """
    kept = folder / "checkpoints" / TRAIN_NAME
    lines: list[str] = []
    try:
        snapshot = read_note(kept / SNAPSHOT)
        with reading(kept / SNAPSHOT, "restore it"):
            found = sorted(kept / result["checkpoint_dir_name"] for result in snapshot["checkpoint_results"])
    except FileNotFoundError:
        return lines  # no checkpoint was committed
    except UserError as error:
        lines.append(f"{str(error).rpartition(':')[0]}; it is made from the checkpoints")
        snapshot, found = {}, sorted(path for path in kept.glob("step-*") if path.is_dir())
    whole = list(found)
    while whole and (reason := _damage(whole[-1])):
        lines.append(f"checkpoint {whole.pop()} is damaged and not used: {reason}")
    if found and not whole:
        raise UserError(f"{'; '.join(lines)}: remove {kept} to start over")
    if lines:
        write_atomically(kept / SNAPSHOT, json.dumps(_list_of(snapshot, whole)))
        for path in found[len(whole) :]:
            shutil.rmtree(path, ignore_errors=True)
    return lines


def _damage(checkpoint: Path) -> str:
    """Return why a checkpoint cannot be used, or an empty string."""
    try:
        workers = int(read_note(checkpoint / STATE_FILE)["workers"])
        if any(checkpoint.glob(_manifest("*"))):  # an older version wrote none
            for rank in range(workers):
                verify(checkpoint, _manifest(rank))
    except FileNotFoundError:
        return f"no {STATE_FILE}"
    except (DamagedError, UserError, KeyError, TypeError, ValueError) as error:
        return str(error)
    return ""


def _list_of(snapshot: dict[str, Any], whole: list[Path]) -> dict[str, Any]:
    """Return Ray Train's list with the checkpoints that exist."""
    import ray

    known = {result["checkpoint_dir_name"]: result for result in snapshot.get("checkpoint_results", [])}
    results = [known.get(path.name) or {"checkpoint_dir_name": path.name, "metrics": {}} for path in whole]
    empty = ("pending_training_results", "pending_validation_specs", "validated_checkpoint_dir_names")
    failed = ("timed_out_validation_checkpoint_dir_names", "failed_validation_checkpoint_dir_names")
    return {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(results))),
        "latest_checkpoint_result": results[-1] if results else None,
        "current_report_index": len(results),
        **{name: [] for name in (*empty, *failed)},
    }


def _manifest(rank: int | str) -> str:
    return f"manifest-{rank}.json"
