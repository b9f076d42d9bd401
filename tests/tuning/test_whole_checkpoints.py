"""A tuning run goes on from the newest whole checkpoint."""

import json
import shutil

import pytest
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

from rayrlhf.errors import UserError
from rayrlhf.tuning.whole_checkpoints import SNAPSHOT, drop_damaged, seal

STEPS = (2, 4, 6)


@pytest.fixture
def kept(tmp_path):
    """Three checkpoints of two workers, as Ray Train leaves them."""
    kept = tmp_path / "checkpoints" / "train"
    for step in STEPS:
        for rank in range(2):
            part = tmp_path / f"part-{step}-{rank}"
            part.mkdir()
            (part / f"state-{rank}.pt").write_bytes(bytes([step]) * 1000)
            if rank == 0:
                (part / "progress.json").write_text(json.dumps({"step": step, "tokens": 7, "workers": 2}))
            seal(part, step, rank)
            shutil.copytree(part, kept / f"step-{step:06d}", dirs_exist_ok=True)
            shutil.rmtree(part)
    results = [{"version": 0, "checkpoint_dir_name": f"step-{step:06d}", "metrics": {"step": step}} for step in STEPS]
    snapshot = _CheckpointManagerState(
        checkpoint_results=results,
        checkpoint_report_indices=[0, 1, 2],
        latest_checkpoint_result=results[-1],
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=3,
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    (kept / SNAPSHOT).write_text(snapshot.json())
    return kept


def latest(kept):
    state = _CheckpointManagerState.parse_obj(json.loads((kept / SNAPSHOT).read_text()))
    assert len(state.checkpoint_results) == len(state.checkpoint_report_indices)
    assert all((kept / result.checkpoint_dir_name).is_dir() for result in state.checkpoint_results)
    return state.latest_checkpoint_result.checkpoint_dir_name


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("file", ["state-0.pt", "state-1.pt", "progress.json", "manifest-1.json"])
@pytest.mark.parametrize("damage", [flip, truncate, lambda path: path.unlink()], ids=["flipped", "truncated", "missing"])
def test_the_next_older_whole_checkpoint_is_used(kept, file, damage):
    damage(kept / "step-000006" / file)
    (line,) = drop_damaged(kept.parents[1])
    assert "step-000006 is damaged and not used" in line
    assert latest(kept) == "step-000004"
    assert not (kept / "step-000006").exists()
    assert drop_damaged(kept.parents[1]) == []


def test_whole_checkpoints_stay_and_so_does_rays_list(kept):
    before = (kept / SNAPSHOT).read_text()
    assert drop_damaged(kept.parents[1]) == []
    assert (kept / SNAPSHOT).read_text() == before
    assert drop_damaged(kept) == []  # a folder without checkpoints


@pytest.mark.parametrize("damage", [flip, truncate, lambda path: path.write_text("")], ids=["flipped", "truncated", "empty"])
def test_a_damaged_list_is_made_from_the_checkpoints(kept, damage):
    text = (kept / SNAPSHOT).read_text()
    damage(kept / SNAPSHOT)
    try:
        json.loads((kept / SNAPSHOT).read_text())
    except ValueError:
        (line,) = drop_damaged(kept.parents[1])
        assert "it is made from the checkpoints" in line
        assert latest(kept) == "step-000006"
    assert text


def test_without_a_whole_checkpoint_the_run_says_so(kept):
    for step in STEPS:
        truncate(kept / f"step-{step:06d}" / "state-0.pt")
    with pytest.raises(UserError, match=r"step-000002 is damaged.*: remove .*train to start over"):
        drop_damaged(kept.parents[1])
