"""A run whose folder is gone, as on another machine, goes on from the copy of its checkpoint on S3."""

import shutil
import time

import pytest

from rayrlhf.observe.journal import read_journal
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.checkpoint import list_checkpoints
from rayrlhf.ppo.train_ppo import train_ppo
from rayrlhf.storage.mirror import Mirror
from tests.ppo.runs import run_config
from tests.storage.test_mirror import bucket  # noqa: F401 - a fixture

SETTINGS = [
    "rollout.backend=transformers",
    "critic.kind=shared",
    "evaluation.enabled=false",
    "run.steps=3",
    "checkpoint.every=2",
    "checkpoint.asynchronous=false",
]

pytestmark = pytest.mark.usefixtures("cluster")


class StopOnceCopied(Callback):
    def __init__(self, mirror):
        self.mirror = mirror

    def on_checkpoint(self, step, folder):
        end = time.monotonic() + 30
        while folder.name not in self.mirror.names() and time.monotonic() < end:
            time.sleep(0.1)
        raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_goes_on_from_its_mirror_when_its_folder_is_gone_on_more_ranks_and_replicas(tmp_path, bucket):  # noqa: F811
    """With sharded optimizer states, which have to be cut anew."""
    settings = [*SETTINGS, "train.zero_stage=2", f"checkpoint.mirror='{bucket('here')}'"]
    config = run_config(tmp_path, *settings)
    with pytest.raises(KeyboardInterrupt):
        train_ppo(config, [StopOnceCopied(Mirror(bucket("here"), "ppo"))])
    shutil.rmtree(config.run.root)
    elsewhere = ["placement.policy.ranks=2", "rollout.replicas=2"]
    result = train_ppo(run_config(tmp_path, *settings, *elsewhere))
    assert result.steps == 3
    assert [row["step"] for row in read_metrics(config.run.folder) if "lr" in row] == [3]
    assert [checkpoint.step for checkpoint in list_checkpoints(config.run.folder / "checkpoints")] == [2, 3]


class BreakTheMirror(Callback):
    """Puts a file where the copies go, as soon as the run has begun."""

    def __init__(self, folder):
        self.folder = folder

    def on_start(self, trainer):
        shutil.rmtree(self.folder)
        self.folder.write_text("in the way")

    def on_step_end(self, step, metrics, scored):
        time.sleep(0.5)  # the copy of the step before has failed by then


@pytest.mark.slow
def test_copies_that_fail_are_in_the_journal_and_the_metrics_while_the_run_goes_on(tmp_path):
    config = run_config(
        tmp_path,
        *SETTINGS,
        "run.steps=4",
        "checkpoint.every=1",
        f"checkpoint.mirror='file://{tmp_path / 'mirror'}'",
    )
    assert train_ppo(config, [BreakTheMirror(tmp_path / "mirror" / "ppo")]).steps == 4
    reasons = [event["reason"] for event in read_journal(config.run.folder) if event["event"] == "mirror"]
    assert len(reasons) == 4
    assert all("cannot write file://" in reason and "run folder are whole" in reason for reason in reasons)
    failed = [row["checkpoint/failed_copies"] for row in read_metrics(config.run.folder) if "lr" in row]
    assert failed == sorted(failed)
    assert 1 <= failed[-1] <= 4
