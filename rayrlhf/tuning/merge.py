"""Exported model of a finished run, optionally with merged adapters."""

from collections.abc import Callable
from pathlib import Path

from rayrlhf.errors import UserError
from rayrlhf.models.adapter_folder import is_adapter_folder, merge_adapters
from rayrlhf.models.model_path import EXPORT, MERGED
from rayrlhf.models.rounding import share_line
from rayrlhf.storage.notes import read_note, reading


def exported_model(
    run: Path, *, merge: bool, target: Path | None = None, report: Callable[[str], object] = lambda _: None
) -> Path:
    """Return the folder of a run's model.

    Args:
        run: the run folder.
        merge: merge adapters into their base model, in a separate folder.
        target: that folder; default `export-merged` in the run folder. An older one is replaced.
        report: receives one line about the precision of the merged weights.

    Raises:
        UserError: the run has no model yet, or `merge` or `target` is set for a model without adapters.
    """
    export = run / EXPORT
    if not export.is_dir():
        raise UserError(f"{run}: no model in {export}, expected the folder of a finished run")
    if not merge:
        if target is not None:
            raise UserError(f"--to {target}: of use with --merge only")
        return export
    if not is_adapter_folder(export):
        raise UserError(f"{export}: a whole model without adapters; use it as it is, without --merge")
    merged = target or run / MERGED
    merge_adapters(export, merged, trust_remote_code=_trusts_remote_code(run))
    report(f"{share_line(merged)} ({export} has the adapters)")
    return merged


def _trusts_remote_code(run: Path) -> bool:
    """Return `model.trust_remote_code` of the run."""
    config = run / "config.yaml"
    with reading(config, "restore it"):
        return bool(read_note(config, "restore it")["model"].get("trust_remote_code", False))
