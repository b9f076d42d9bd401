"""A run whose replica has two worker processes: one of them is killed, and the replica comes back as a whole."""

import os

import psutil
import pytest
import ray

from rayrlhf.observe.journal import read_journal
from rayrlhf.observe.metric_names import LOGPROB_GAP
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.train_ppo import train_ppo
from tests.ppo.runs import run_config


class KillsAWorker(Callback):
    """Kills one of the two worker processes of the replica after the second step."""

    def on_start(self, trainer):
        self.trainer = trainer

    def on_step_end(self, step, metrics, scored):
        if step == 2:
            (replica,) = self.trainer.actor_groups["rollout"].handles
            children = psutil.Process(ray.get(replica.__ray_call__.remote(lambda _: os.getpid()))).children(recursive=True)
            self.workers = [child for child in children if "Worker_TP" in " ".join(child.cmdline())]
            self.workers[1].kill()


@pytest.mark.nightly
def test_a_replica_that_lost_a_worker_is_rebuilt_and_samples_from_the_current_weights(tmp_path):
    settings = [
        "rollout.tensor_parallel_size=2",
        "critic.kind=shared",
        "algorithm.kl.coefficient=0",
        "evaluation.enabled=false",
    ]
    settings += ["model.path=builtin:tiny?layers=2&hidden=128&context=64"]
    config = run_config(tmp_path, *settings, "model.dtype=float32", "train.learning_rate=1e-2", "run.steps=4")
    watch = KillsAWorker()
    train_ppo(config, [watch])
    rows = [row for row in read_metrics(config.run.folder) if LOGPROB_GAP in row]
    assert len(rows) == 4
    assert all(row[LOGPROB_GAP] < 1e-5 for row in rows)
    assert len(watch.workers) == 2
    assert not any(worker.is_running() for worker in watch.workers)
    lost = [event for event in read_journal(config.run.folder) if event["event"] == "lost"]
    assert [event["actor"].rpartition("/")[0] for event in lost] == [f"{config.run.name}/rollout"]
