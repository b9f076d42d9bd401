"""The loop of one worker, in this process: from any of its checkpoints it takes the same steps again.

Ray Train's part is played by a folder here; `test_recovery.py` kills real workers.
"""

import json
import shutil
from pathlib import Path

import pytest
import ray
import ray.train

from rayrlhf.models.load import load_tokenizer
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.tuning import tuning_loop as loop
from rayrlhf.tuning.data_plan import STATE_FILE, TRAIN_NAME, checkpoint_name
from rayrlhf.tuning.refusal import raise_refusal
from rayrlhf.tuning.task import PreferenceTask, SupervisedTask
from rayrlhf.tuning.tuning_loop import TuningJob, train_loop
from tests.engines.training import join_alone
from tests.tuning.runs import reward_config, sft_config


class LocalTrain:
    """Runs the loop of a task, keeping its checkpoints where Ray Train would."""

    def __init__(self, task, monkeypatch):
        join_alone()
        monkeypatch.setattr(loop, "leave", lambda: None)  # all tests of this process share one process group
        monkeypatch.setattr(ray, "get", lambda reference: reference)
        monkeypatch.setattr(ray.train, "report", self._report)
        monkeypatch.setattr(
            ray.train, "get_checkpoint", lambda: self._start and ray.train.Checkpoint.from_directory(self._start)
        )
        self.folder = task.config.run.folder.absolute()
        self.folder.mkdir(parents=True)
        train, held_out, _ = task.load(load_tokenizer(task.config.model))
        self._job = TuningJob(task, self.folder, Path.cwd(), (train, held_out), 1)
        self._start = None

    def checkpoint(self, step):
        return self.folder / "checkpoints" / TRAIN_NAME / checkpoint_name(step)

    def run(self, start=None):
        self._start = start
        train_loop({"job": self._job})
        raise_refusal(self.folder)
        return [(row["step"], row["loss"], row["num_tokens"]) for row in read_metrics(self.folder) if "loss" in row]

    def _report(self, metrics, checkpoint, checkpoint_dir_name):
        target = self.folder / "checkpoints" / TRAIN_NAME / checkpoint_dir_name
        shutil.copytree(checkpoint.path, target, dirs_exist_ok=True)


def task_of(kind, folder, *overrides):
    if kind == "sft":
        return SupervisedTask(sft_config(folder, "evaluation.generations=0", *overrides))
    return PreferenceTask(reward_config(folder, *overrides))


@pytest.mark.parametrize("kind", ["sft", "sft with noise", "reward"])
def test_a_resumed_loop_takes_the_same_steps_bit_for_bit(tmp_path, monkeypatch, kind):
    noise = ["train.neftune_alpha=5"] if kind == "sft with noise" else []
    local = LocalTrain(task_of(kind.split()[0], tmp_path, *noise), monkeypatch)
    undisturbed = local.run()
    assert [step for step, _, _ in undisturbed] == [1, 2, 3, 4, 5, 6]
    assert local.run(local.checkpoint(2)) == undisturbed
    evaluations = [row["step"] for row in read_metrics(local.folder) if "evaluation/loss" in row]
    assert evaluations == [0, 6], "nothing is written twice"


@pytest.mark.parametrize("stage", [0, 2])
def test_state_of_another_number_of_workers_is_taken_over_whole_or_sharded(tmp_path, monkeypatch, stage):
    local = LocalTrain(task_of("reward", tmp_path, f"train.zero_stage={stage}"), monkeypatch)
    undisturbed = local.run()
    path = local.checkpoint(2) / STATE_FILE
    path.write_text(path.read_text().replace('"workers": 1', '"workers": 3'))
    (local.checkpoint(2) / "random-00000.pt").unlink()
    assert local.run(local.checkpoint(2)) == undisturbed


def test_the_best_checkpoint_is_exported_and_not_the_last(tmp_path, monkeypatch):
    import torch
    from safetensors.torch import load_file

    local = LocalTrain(task_of("sft", tmp_path, "checkpoint.best_metric=loss"), monkeypatch)
    local.run()
    path = local.folder / "metrics.jsonl"
    rows = read_metrics(local.folder)
    for row in rows:
        if "evaluation/loss" in row:
            row["evaluation/loss"] = 0.5 if row["step"] == 4 else 1.0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    local.run(local.checkpoint(6))
    assert len(read_metrics(local.folder)) == len(rows), "there was nothing left to train"
    stored = torch.load(local.checkpoint(4) / "state" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    exported = load_file(local.folder / "export" / "model.safetensors")
    assert torch.equal(exported["model.norm.weight"], stored["model.model.norm.weight"])
