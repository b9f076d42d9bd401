"""A run folder is one run's: it resumes with equal settings, and settings nothing was made with may still change."""

import pytest

from rayrlhf.batch_inference.stage_resources import PartProgress
from rayrlhf.errors import UserError
from rayrlhf.pipelines.presft.presft_folder import Layout, may_change, open_presft
from tests.pipelines.presft.runs import presft_config


@pytest.mark.parametrize(
    ("key", "before", "after"),
    [
        ("select.rule", True, False),
        ("relabel.method", True, False),
        ("run.rounds", True, True),
        ("pipeline.scorers", True, True),
        ("pipeline.rows_per_part", False, False),
        ("workers.count", True, True),
        ("quality.temperature", True, True),
        ("probe.temperature", False, False),
        ("run.seed", False, False),
        ("model.path", False, False),
        ("train.epochs", False, False),
    ],
)
def test_a_setting_is_fixed_once_something_was_made_with_it(key, before, after):
    assert may_change(key, relabeled=False) == before
    assert may_change(key, relabeled=True) == after


def test_another_cut_may_be_tried_until_decisions_were_made(tmp_path):
    config, other = presft_config(tmp_path), presft_config(tmp_path, "select.rule=threshold", "select.value=50.0")
    open_presft(config).close()
    open_presft(other).close()
    assert "threshold" in (config.run.folder / "config.yaml").read_text()
    relabeled = Layout(config.run.folder).round(1).relabeled
    relabeled.path.mkdir(parents=True)
    relabeled.part(0).touch()
    open_presft(other).close()
    with pytest.raises(UserError, match=r"select\.rule"):
        open_presft(config)


def test_a_folder_with_other_files_is_never_written_into(tmp_path):
    config = presft_config(tmp_path)
    config.run.folder.mkdir(parents=True)
    (config.run.folder / "precious.txt").touch()
    with pytest.raises(UserError, match="has files in it"):
        open_presft(config)


def test_progress_speaks_now_and_then_and_at_the_end():
    lines = []

    class View:
        def note(self, text):
            lines.append(text)

    times = iter([0.0, 5.0, 11.0, 20.0, 22.0])
    done = PartProgress(View(), clock=lambda: next(times)).rows("scoring", 100)
    for rows in (10, 40, 40, 10):
        done(rows)
    assert lines == ["scoring: 50 of 100 rows, 5 rows/s, 11s left", "scoring: 100 of 100 rows, 5 rows/s in 22s"]
