"""A run whose weights go by vLLM's nccl transfer, from actor to actor, over a communicator of vLLM's own that needs no GPU."""

from types import SimpleNamespace

import pytest
import ray
import torch

from rayrlhf.actors import actor_groups as actor_groups
from rayrlhf.actors.rollout_actor import RolloutActor
from rayrlhf.actors.train_actor import PolicyActor
from rayrlhf.observe.metric_names import LOGPROB_GAP
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.train_ppo import train_ppo
from tests.ppo.runs import run_config


def take_the_gpu_away():
    """Let vLLM's transfer speak through a TCP store in this process, where it would through NCCL."""
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.distributed.weight_transfer import nccl_common

    def group(host, port, rank, world_size, device):
        meeting = StatelessProcessGroup.create(host=host, port=port, rank=rank, world_size=world_size)

        def broadcast(tensor, src, stream):
            found = meeting.broadcast(tensor, src)
            tensor.copy_(found)

        return SimpleNamespace(broadcast=broadcast, destroy=lambda: None)

    nccl_common.stateless_init_process_group = group
    torch.cuda.current_stream = lambda: None
    torch.accelerator.current_device_index = lambda: 0


class Policy(PolicyActor):
    """A policy rank without a GPU."""

    def build(self, group, spec):
        super().build(group, spec)
        take_the_gpu_away()


class Rollouts(RolloutActor):
    """A replica without a GPU."""

    def build(self, spec):
        super().build(spec)
        take_the_gpu_away()


class KillsAReplica(Callback):
    """Ends one of two replicas after the first step."""

    def on_start(self, trainer):
        self.trainer = trainer

    def on_step_end(self, step, metrics, scored):
        if step == 1:
            ray.kill(self.trainer.actor_groups["rollout"].handles[1])


@pytest.mark.nightly
def test_what_the_policy_sends_is_what_replicas_sample_from_and_a_lost_one_joins_a_new_group(tmp_path, monkeypatch):
    classes = {**actor_groups.ACTOR_CLASSES, "policy": Policy, "rollout": Rollouts}
    monkeypatch.setattr(actor_groups, "ACTOR_CLASSES", classes)
    monkeypatch.setattr("rayrlhf.actors.placement._check_transfer", lambda config, plan: None)
    settings = ["rollout.weight_transfer=nccl", "placement.mode=disaggregated", "critic.kind=shared", "rollout.replicas=2"]
    config = run_config(tmp_path, *settings, "algorithm.kl.coefficient=0", "run.steps=8", "evaluation.enabled=false")
    train_ppo(config, [KillsAReplica()])
    rows = [row for row in read_metrics(config.run.folder) if LOGPROB_GAP in row]
    assert len(rows) == 8
    assert all(row[LOGPROB_GAP] < 1e-3 for row in rows)
