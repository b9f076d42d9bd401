"""A model folder as a hub repository in an offline cache."""

import shutil
from pathlib import Path

import pytest

COMMIT = "0" * 40


def as_hub_model(folder: Path, cache: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy a folder into the cache of a hub that cannot be reached; returns the copy."""
    import huggingface_hub.constants

    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return Path(shutil.copytree(folder, repository / "snapshots" / COMMIT))
