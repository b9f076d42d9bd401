"""Runs with LoRA: adapters go to vLLM unmerged, also to a replica that was lost; merged weights report what rounding kept."""

import pytest
import ray

from rayrlhf.observe.metric_names import LOGPROB_GAP, UPDATE_ARRIVED
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.train_ppo import train_ppo
from tests.ppo.runs import run_config

LORA = ["model.lora={rank: 4}", "critic.kind=shared", "evaluation.enabled=false", "algorithm.kl.coefficient=0"]

pytestmark = pytest.mark.usefixtures("cluster")


class KillsTheReplica(Callback):
    """Ends the only replica after the second step, and counts the tensors of a sync."""

    def on_start(self, trainer):
        self.groups = trainer.actor_groups

    def on_step_end(self, step, metrics, scored):
        if step == 2:
            buckets = ray.get(list(self.groups["policy"].weights(2**28, "float32", adapters=True)))
            self.names = [tensor.name for bucket in buckets for tensor in bucket]
            ray.kill(self.groups["rollout"].handles[0])


@pytest.mark.slow
def test_vllm_samples_from_the_adapters_after_every_sync_sleep_and_rebuild(tmp_path):
    config = run_config(
        tmp_path,
        *LORA,
        "model.dtype=float32",
        "rollout.lora=adapter",
        "train.learning_rate=1e-2",
        "rollout.sleep=true",
        "run.steps=4",
    )
    watch = KillsTheReplica()
    train_ppo(config, [watch])
    rows = [row for row in read_metrics(config.run.folder) if LOGPROB_GAP in row]
    assert len(rows) == 4
    assert all(row[LOGPROB_GAP] < 1e-5 for row in rows)
    assert all("lora_" in name for name in watch.names)
    assert not any(UPDATE_ARRIVED in row for row in rows)


@pytest.mark.slow
def test_merged_adapters_in_bfloat16_report_the_share_that_arrived(tmp_path):
    run = ["rollout.backend=transformers", "model.dtype=bfloat16", "train.learning_rate=1e-5", "run.steps=1"]
    config = run_config(tmp_path, *LORA, *run)
    train_ppo(config)
    (row,) = (row for row in read_metrics(config.run.folder) if LOGPROB_GAP in row)
    assert 0 <= row[UPDATE_ARRIVED] < 1.1
