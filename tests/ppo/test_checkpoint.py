"""Which checkpoint a run takes up: the newest whole one that fits, and never a torn one."""

import shutil

import pytest

from rayrlhf.config.loading.load import dump_config
from rayrlhf.config.runtime import CheckpointSection
from rayrlhf.engines.train.training_state import write
from rayrlhf.errors import UserError
from rayrlhf.ppo.checkpoint import Checkpoint, Checkpointer, list_checkpoints, newest_usable
from rayrlhf.ppo.run_identity import fingerprint, stored_differences
from rayrlhf.ppo.run_loop import best_metric
from rayrlhf.storage.atomic import PendingFolder, remove_leftovers
from rayrlhf.storage.manifest import Manifest, write_hashed, write_manifest
from rayrlhf.storage.mirror import Mirror
from tests.ppo.runs import run_config

FITS = {"train.zero_stage": "0"}


def make(folder, step, content=b"{}"):
    path = folder / f"step-{step:06d}"
    path.mkdir(parents=True)
    write_manifest(path, Manifest(step, FITS, {"state.json": write_hashed(path / "state.json", content)}))
    return Checkpoint(step, path)


def test_the_newest_whole_checkpoint_is_used(tmp_path):
    make(tmp_path, 5)
    newest = make(tmp_path, 10)
    assert newest_usable(tmp_path, FITS) == (newest, [])


def test_a_damaged_checkpoint_is_named_in_a_line_and_the_one_before_is_used(tmp_path):
    before, torn, cut = (make(tmp_path, step) for step in (5, 10, 15))
    (torn.folder / "state.json").write_bytes(b"[]")
    (cut.folder / "manifest.json").unlink()
    found, lines = newest_usable(tmp_path, FITS)
    assert found == before
    assert len(lines) == 2
    assert "step-000015 is damaged and not used: manifest.json: No such file" in lines[0]
    assert "step-000010 is damaged and not used: state.json: its SHA-256 differs" in lines[1]


def test_of_a_mirror_the_newest_whole_checkpoint_is_fetched_in_place_of_a_damaged_one(tmp_path):
    mirror = Mirror(f"file://{tmp_path}/mirror", "run")
    elsewhere, here = tmp_path / "mirror" / "run", tmp_path / "here"
    make(here, 5)
    for step in (5, 10, 15, 20):
        make(elsewhere, step)
    shutil.copytree(elsewhere / "step-000010", here / "step-000010")
    (here / "step-000010" / "state.json").write_bytes(b"")
    (elsewhere / "step-000015" / "state.json").write_bytes(b"[]")
    (elsewhere / "step-000020" / "state.json").unlink()
    checkpointer = Checkpointer(here, None, CheckpointSection(), FITS, 1.0, mirror)
    damaged, torn, fetched = checkpointer.fetch()
    assert "step-000020 in file://" in damaged
    assert "step-000015 in file://" in torn
    assert "step-000010 fetched from" in fetched
    assert checkpointer.find() == (Checkpoint(10, here / "step-000010"), [])
    assert checkpointer.fetch() == [damaged, torn]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_by_itself(tmp_path):
    (make(tmp_path, 5).folder / "state.json").write_bytes(b"")
    with pytest.raises(UserError, match=r"state\.json: 0 bytes, expected 2: remove .* to start over"):
        newest_usable(tmp_path, FITS)


def test_a_checkpoint_of_another_set_up_is_refused_with_the_difference(tmp_path):
    make(tmp_path, 5)
    with pytest.raises(UserError, match=r"step-000005 does not fit this run \(train\.zero_stage: 0 -> 3\)"):
        newest_usable(tmp_path, {"train.zero_stage": "3"})


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.path=builtin:tiny?layers=1&hidden=64&context=64", "model"),
        ("model.lora={rank: 4}", "model.lora"),
        ("critic.kind=shared", "critic.kind"),
        ("train.optimizer.name=sgd", "train.optimizer.name"),
        ("train.zero_stage=2", "train.zero_stage"),
    ],
)
def test_what_cannot_load_the_state_is_in_the_fingerprint(tmp_path, override, key):
    one, other = fingerprint(run_config(tmp_path)), fingerprint(run_config(tmp_path, override))
    assert one[key] != other[key]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_does_not_matter_for_loading_is_not(tmp_path, stage):
    other = ["run.seed=4", "rollout.temperature=0.5", "placement.policy.ranks=2", "placement.critic.ranks=3"]
    one, another = (fingerprint(run_config(tmp_path, f"train.zero_stage={stage}", *more)) for more in ([], other))
    assert one == another


ELSEWHERE = ["placement.policy.ranks=2", "rollout.replicas=3", "observe.live=true", "deadlines.sync=5", "recovery.attempts=9"]


def test_a_run_may_go_on_elsewhere_but_not_as_another_and_an_exact_one_not_at_all(tmp_path):
    def lines(before, after):
        return stored_differences(*(dump_config(run_config(tmp_path, *overrides)) for overrides in (before, after)))

    assert lines([], ELSEWHERE) == []
    assert lines([], [*ELSEWHERE, "run.seed=4"]) == ["run.seed: 0 -> 4"]
    exact = "run.determinism=exact"
    assert lines([exact], [exact, "rollout.replicas=3"]) == ["rollout.replicas: 1 -> 3"]


def test_half_written_folders_are_neither_listed_nor_kept(tmp_path):
    make(tmp_path, 5)
    pending = PendingFolder(tmp_path / "step-000010")
    (pending.partial / "state.json").write_text("{}")
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [5]
    assert remove_leftovers(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


def test_a_disk_that_is_full_while_a_rank_writes_is_the_users_one_line(tmp_path):
    import numpy as np

    (tmp_path / "model.pt").symlink_to("/dev/full")
    with pytest.raises(UserError, match=f"cannot write checkpoint {tmp_path}: No space left on device"):
        write({"model.pt": np.zeros(8, np.uint8)}, tmp_path)


def test_a_metric_that_does_not_exist_is_named_with_the_nearest_that_does():
    assert best_metric({"objective/scores": 0.5}, "objective/scores") == 0.5
    assert best_metric({}, None) is None
    with pytest.raises(UserError, match=r"checkpoint\.best_metric: no metric 'objective/score'; did you mean objective/scores"):
        best_metric({"objective/scores": 0.5}, "objective/score")
