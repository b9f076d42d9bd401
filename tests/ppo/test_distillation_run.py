"""Runs with a teacher: the distance to it shrinks, and a lost teacher is replaced."""

import json

import pytest
import ray

from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.train_ppo import train_ppo
from tests.ppo.runs import run_config

pytestmark = pytest.mark.usefixtures("cluster")


class KillsTheTeacher(Callback):
    """Ends the teacher's process after the second step."""

    def on_start(self, trainer):
        self.groups = trainer.actor_groups

    def on_step_end(self, step, metrics, scored):
        if step == 2:
            ray.kill(self.groups["teacher"].handles[0])


TEACHER = "teacher.model.path=builtin:tiny?layers=1&hidden=64&context=64&seed=1"


@pytest.mark.slow
def test_a_student_comes_nearer_to_its_teacher_and_a_lost_teacher_returns(tmp_path):
    config = run_config(
        tmp_path,
        "preset=opd",
        TEACHER,
        "rollout.backend=transformers",
        "rollout.prompts_per_step=32",
        "train.mini_batch_size=128",
        "train.learning_rate=3e-3",
        "evaluation.enabled=false",
        "run.steps=6",
    )
    train_ppo(config, [KillsTheTeacher()])
    distances = [row["objective/teacher_kl"] for row in read_metrics(config.run.folder) if "objective/teacher_kl" in row]
    assert len(distances) == 6
    assert distances[0] > 0
    assert distances[-1] < 0.8 * distances[0]


@pytest.mark.slow
def test_a_divergence_shrinks_on_own_samples_and_on_responses_of_the_dataset(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {row}", "answer": f"{row * 7}"}) + "\n" for row in range(64)))
    config = run_config(
        tmp_path,
        "preset=gkd",
        TEACHER,
        "teacher.divergence={vocabulary: 32, student_share: 0.5, response_field: answer}",
        f"data.train.path={path}",
        "rollout.backend=transformers",
        "rollout.prompts_per_step=32",
        "train.mini_batch_size=16",
        "train.learning_rate=3e-3",
        "evaluation.enabled=false",
        "run.steps=10",
    )
    train_ppo(config, [KillsTheTeacher()])
    rows = [row for row in read_metrics(config.run.folder) if "loss/distillation" in row]
    assert len(rows) == 10
    for kind in (0.0, 1.0):
        distances = [row["loss/distillation"] for row in rows if row["objective/student_step"] == kind]
        assert len(distances) >= 2
        assert distances[-1] < 0.7 * distances[0]
