"""Folders that `model.path` names."""

import os
from pathlib import Path

from rayrlhf.config.model import ModelSection
from rayrlhf.models.model_path import EXPORT, MERGED, model_folder


def test_a_run_is_its_merged_adapters_until_a_later_export_replaces_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in (EXPORT, MERGED):
        (run / name).mkdir(parents=True)
        (run / name / "config.json").write_text("{}")
    (run / "config.yaml").write_text("{}")
    for changed, expected in ((50, MERGED), (150, EXPORT)):
        os.utime(run / EXPORT, (changed, changed))
        os.utime(run / MERGED, (100, 100))
        assert model_folder(ModelSection(path=str(run))) == run / expected
