"""A whole run of an estimator that needs neither critic nor reference, on the actors that are left."""

import sys
from collections import Counter

import numpy as np
import pytest
import ray

from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.train_ppo import train_ppo
from tests.ppo.runs import run_config


def digit_at_all(responses):
    """A reward that is often the same for all responses to a prompt: whether there is any digit."""
    return [float(any(character.isdigit() for character in text)) for text in responses]


class Watch(Callback):
    """Notes the roles, the prompts of each step, and what is outstanding at its end."""

    def __init__(self):
        self.roles, self.prompts, self.outstanding, self.scored = (), [], [], []

    def on_start(self, trainer):
        self.trainer = trainer
        self.roles = tuple(trainer.actor_groups.groups)

    def on_end(self, trainer):
        (reward,) = trainer.actor_groups["reward"].handles
        self.reward_has_torch = ray.get(reward.__ray_call__.remote(lambda _: "torch" in sys.modules))

    def on_step_end(self, step, metrics, scored):
        self.prompts.append(Counter(rollout.key.prompt for rollout in scored.rollouts))
        self.outstanding.append(self.trainer.sampler.state_dict()["outstanding"])
        self.scored.append(scored)


@pytest.mark.slow
def test_grpo_refills_its_steps_without_critic_or_reference(tmp_path):
    config = run_config(
        tmp_path,
        "reward.functions=[{name: tests.ppo.test_group_run:digit_at_all}]",
        "rollout.backend=transformers",
        "rollout.prompts_per_step=8",
        "rollout.samples_per_prompt=2",
        "rollout.refill_rounds=2",
        "algorithm.advantage.estimator=grpo",
        "algorithm.policy_loss={name: gspo, clip_low: 0.0003, clip_high: 0.0004}",
        "algorithm.kl.coefficient=0",
        "algorithm.off_policy_correction.level=token",
        "evaluation.enabled=false",
    )
    watch = Watch()
    train_ppo(config, [watch])
    assert not ray.is_initialized()
    assert set(watch.roles) == {"policy", "reward", "rollout"}
    rows = [row for row in read_metrics(config.run.folder) if "lr" in row]
    assert len(rows) == 2
    for row, prompts, outstanding, scored in zip(rows, watch.prompts, watch.outstanding, watch.scored, strict=True):
        assert set(prompts.values()) <= {2, 4}
        assert sum(prompts.values()) == 16
        # What was left out counts as used: nothing is out at a step's end, and the next step goes on behind it.
        assert outstanding == []
        assert row["sampling/prompts"] - row["sampling/prompts_left_out"] == 8
        assert row["sampling/prompts_left_out"] > 0
        assert np.isfinite(row["policy/grad_norm"])
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-4)
        assert "critic/grad_norm" not in row
        assert scored.forward_passes.keys() == {"policy"}
    assert max(row["policy/grad_norm"] for row in rows) > 0


@pytest.mark.slow
def test_overissued_groups_are_canceled_and_counted(tmp_path):
    config = run_config(
        tmp_path,
        "rollout.backend=transformers",
        "rollout.max_concurrent=4",
        "rollout.prompts_per_step=8",
        "rollout.samples_per_prompt=2",
        "rollout.overissue=0.75",
        "rollout.max_new_tokens=24",
        "critic.kind=shared",
        "evaluation.enabled=false",
    )
    watch = Watch()
    train_ppo(config, [watch])
    rows = [row for row in read_metrics(config.run.folder) if "lr" in row]
    assert len(rows) == 2
    for row, prompts, outstanding, scored in zip(rows, watch.prompts, watch.outstanding, watch.scored, strict=True):
        assert set(prompts.values()) <= {2, 4}
        assert sum(prompts.values()) == row["ledger/trained"] == 16
        assert outstanding == []
        assert (row["sampling/prompts"], row["sampling/prompts_left_out"]) == (14, 6)
        assert (row["ledger/issued"], row["ledger/overissued"]) == (28, 12)
        kept = sum(len(one.response_ids) for one in scored.rollouts)
        assert row["sampling/tokens"] == kept + row["sampling/overissued_tokens"]
        assert 0 < row["sampling/overissued_tokens"] <= 12 * 24
    assert not watch.reward_has_torch


@pytest.mark.nightly
def test_remax_compares_each_response_with_the_greedy_one(tmp_path):
    config = run_config(
        tmp_path,
        "rollout.backend=transformers",
        "rollout.prompts_per_step=8",
        "algorithm.advantage.estimator=remax",
        "algorithm.kl={coefficient: 0.05, placement: loss}",
        "evaluation.enabled=false",
        "run.steps=1",
    )
    watch = Watch()
    train_ppo(config, [watch])
    assert set(watch.roles) == {"policy", "reference", "reward", "rollout"}
    (scored,) = watch.scored
    assert scored.greedy is not None
    assert {rollout.key.prompt for rollout in scored.greedy.rollouts} == {rollout.key.prompt for rollout in scored.rollouts}
    assert len(scored.greedy.rollouts) == 8
    (row,) = (row for row in read_metrics(config.run.folder) if "lr" in row)
    assert row["loss/kl_avg"] == pytest.approx(0.0, abs=1e-3)
    assert row["objective/non_score_reward"] == 0
