"""A run whose replica has a stage on each of two nodes of a Ray cluster: one of them is killed, and the replica comes back."""

import os
import signal

import pytest
import ray
from ray.cluster_utils import Cluster

from rayrlhf.observe.journal import read_journal
from rayrlhf.observe.metric_names import LOGPROB_GAP
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.train_ppo import train_ppo
from tests.ppo.runs import run_config


@pytest.fixture
def two_nodes():
    """Two nodes of two CPUs each."""
    cluster = Cluster()
    for _ in range(2):
        cluster.add_node(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20)
    ray.init(address=cluster.address, log_to_driver=False)
    yield
    ray.shutdown()
    cluster.shutdown()


class KillsANode(Callback):
    """Kills the process on the replica's second node after the second step."""

    def on_start(self, trainer):
        self.name, self.killed = trainer.actor_groups["rollout"].names[0], []

    def on_step_end(self, step, metrics, scored):
        location = ray.get(ray.get_actor(f"{self.name}/node-1").ping.remote())
        self.killed.append(location)
        if step == 2:
            os.kill(location.pid, signal.SIGKILL)


@pytest.mark.nightly
def test_a_replica_over_two_nodes_samples_from_every_update_and_is_rebuilt_when_it_loses_one(tmp_path, two_nodes):
    model = ["model.path=builtin:tiny?layers=2&hidden=64&context=64", "model.dtype=float32", "train.learning_rate=1e-2"]
    roles = ["critic.kind=shared", "algorithm.kl.coefficient=0", "evaluation.enabled=false", "run.steps=3"]
    cpus = ["placement.rollout_cpus=2.4", "placement.policy.cpus=0.4", "placement.reward.cpus=0.4"]
    config = run_config(tmp_path, "rollout.pipeline_parallel_size=2", *model, *roles, *cpus)
    watch = KillsANode()
    train_ppo(config, [watch])
    rows = [row for row in read_metrics(config.run.folder) if LOGPROB_GAP in row]
    assert [row[LOGPROB_GAP] < 1e-5 for row in rows] == [True] * 3
    assert len({location.pid for location in watch.killed}) == 2
    lost = [event for event in read_journal(config.run.folder) if event["event"] == "lost"]
    assert [event["actor"] for event in lost] == [watch.name]
