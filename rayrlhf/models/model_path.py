"""Resolution of `model.path` to a local folder."""

import difflib
import os
import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from rayrlhf.config.model import ModelSection
from rayrlhf.config.section import lasting
from rayrlhf.errors import UserError
from rayrlhf.models.model_files import ADAPTERS, has_weights

EXPORT, MERGED = "export", "export-merged"
"""Folders of a run's model in the run folder: as trained, and with merged adapters."""
HUB_SECONDS = 3.0
"""Time to reach the hub."""
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py", "value_head/*", "1_Pooling/*"]
"""Files of a hub model that anything here reads."""
_OTHER = ["original/*", "metal/*", "consolidated*", "onnx/*", "openvino/*"]
"""Other formats of the same model."""


def resolve_path(model: ModelSection) -> str:
    """Return the folder or hub name of `model.path`; builds a built-in that is not cached.

    A run folder is the model that the run exported.

    Raises:
        UserError: a path that is neither a model folder nor a possible hub name, a run without a model, or an unknown built-in.
    """
    if model.path.startswith("builtin:"):
        from rayrlhf.models.builtin import resolve_model

        return str(resolve_model(model.path))
    folder = Path(model.path).expanduser()
    folder = folder if folder.is_dir() or not lasting(folder).is_dir() else lasting(folder)
    if folder.is_dir():
        if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
            folder = _model_of_run(folder)
        if not (folder / "config.json").is_file():
            if (folder / ADAPTERS).is_file():
                raise UserError(f"model.path {model.path!r}: the folder holds adapters; merge them into their model first")
            raise UserError(f"model.path {model.path!r}: the folder has no config.json, expected a Hugging Face model folder")
        return str(folder)
    if folder.is_file():
        raise UserError(f"model.path {model.path!r}: a file, expected the Hugging Face folder of a model")
    parent = folder.parent
    if model.path.startswith((".", "/", "~")) or model.path.count("/") > 1 or (parent != Path() and parent.is_dir()):
        near = difflib.get_close_matches(folder.name, [one.name for one in parent.glob("*/")], n=1)
        raise UserError(f"model.path {model.path!r}: no such folder{f'; did you mean {parent / near[0]}?' if near else ''}")
    use_hub_cache_if_offline()
    return model.path


@cache
def use_hub_cache_if_offline() -> None:
    """Use the hub's cache only, if the hub cannot be reached.

    Asking it takes a minute of retries. Behind a proxy it is asked.
    """
    if os.environ.get("HF_HUB_OFFLINE") or any(name.lower() in ("https_proxy", "all_proxy") for name in os.environ):
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((host.hostname or "", host.port or 443), timeout=HUB_SECONDS).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # also for the processes of the run
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = True


def fresh_merge(run: Path) -> list[Path]:
    """Return the folder of a run's merged adapters, unless a later export has replaced them."""
    merged, export = run / MERGED, run / EXPORT
    fresh = merged.is_dir() and not (export.is_dir() and export.stat().st_mtime > merged.stat().st_mtime)
    return [merged] if fresh else []


def _model_of_run(run: Path) -> Path:
    """Return the folder of a run's model, its adapters merged."""
    export = run / EXPORT
    for merged in fresh_merge(run):
        return merged
    if not export.is_dir():
        raise UserError(f"model.path {str(run)!r}: this run has no model in {EXPORT}/ yet; finish it first")
    if not (export / "config.json").is_file():
        raise UserError(f"model.path {str(run)!r}: {EXPORT}/ holds adapters; merge them with `rayrlhf export {run} --merge`")
    return export


def model_folder(model: ModelSection, *, download: bool = True) -> Path:
    """Return the folder with the model's files.

    A hub model is in the local cache.

    Args:
        model: the model.
        download: fetch missing files of a hub model. Without it the folder may lack some.

    Raises:
        UserError: no such folder or hub model, or no file of it is in the cache.
    """
    path = resolve_path(model)
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
    )

    try:
        folder = snapshot_download(
            path, revision=model.revision, allow_patterns=_FILES, ignore_patterns=_OTHER, local_files_only=not download
        )
    except IncompleteSnapshotError as error:  # readers name the file that they lack
        folder = error.snapshot_path
    except (OSError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(f"model.path {model.path!r}: {one_line_reason(error)}") from error
    return Path(folder)


def present_folder(model: ModelSection) -> Path | None:
    """Return the folder with the model's files, without a download.

    None if its weights are not all here.

    Raises:
        UserError: no such local folder.
    """
    path = resolve_path(model)
    if Path(path).is_dir():
        return Path(path)
    try:
        folder = model_folder(model, download=False)
    except UserError:
        return None
    return folder if has_weights(folder) else None


def one_line_reason(error: Exception) -> str:
    """Return the reason of an error of transformers on one line."""
    if isinstance(error, KeyError) and error.args:
        name = str(error.args[0])
        return name if " " in name else f"transformers knows no {name!r}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if "custom code" in lines[0]:
        return "it has Python code of its own; read that, and set model.trust_remote_code to true"
    if lines[0].startswith("Couldn't instantiate the backend tokenizer"):
        return "no tokenizer.json that can be read"
    if lines[0].startswith("PytorchStreamReader"):
        return "pytorch_model.bin is damaged or cut; fetch it again"
    if lines[0].startswith("Weights only load failed"):
        return "pytorch_model.bin holds Python objects, expected tensors alone"
    return f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
