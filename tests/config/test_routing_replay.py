"""What excludes routing replay is one line before anything starts."""

import pytest

from rayrlhf.actors.role_specs import train_spec
from rayrlhf.config.loading.load import load_config
from rayrlhf.config.pipelines import EvaluateConfig
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.errors import UserError
from rayrlhf.ppo.rollout_collector import forward_passes
from rayrlhf.ppo.run_models import check_models
from rayrlhf.ppo.update_objectives import make_objectives

ON, OLD = "rollout.routing_replay=rollout", "rollout.routing_replay=old"
PASS = "algorithm.old_logprobs=recomputed"
GROUPS = ["algorithm.advantage.estimator=rloo", "rollout.samples_per_prompt=2", "algorithm.kl.coefficient=0"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["rollout.routing_replay=on"], "expected 'off', 'rollout' or 'old'"),
        ([OLD, "algorithm.old_logprobs=rollout"], "'old' with algorithm.old_logprobs 'rollout': .* expected 'recomputed'"),
        (
            [OLD, *GROUPS],
            "'old' with algorithm.old_logprobs 'auto': no pass before the update chooses them; expected 'recomputed'",
        ),
        ([OLD, PASS, "observe.record=light"], "'old' with observe.record 'light'"),
        ([OLD, PASS, "placement.policy={ranks: 2, sequence_parallel: 2}"], "'old' with placement.policy.sequence_parallel 2"),
        ([ON, "environment={name: calculator}"], "with environment"),
        ([ON, "observe.record=light"], "with observe.record 'light'"),
        ([ON, "rollout.backend=my.engine:Engine"], "with rollout.backend 'my.engine:Engine'"),
        ([ON, "rollout.tensor_parallel_size=2"], "with rollout.tensor_parallel_size 2"),
        ([ON, "rollout.pipeline_parallel_size=2"], "with rollout.pipeline_parallel_size 2"),
        ([ON, "placement.policy={ranks: 2, sequence_parallel: 2}"], "with placement.policy.sequence_parallel 2"),
        ([ON, "placement.policy={ranks: 2, tensor_parallel: 2}"], "with placement.policy.tensor_parallel 2"),
        (
            [ON, "rollout.demonstrations={train_with: without_demonstrations, context: {layout: turns}}"],
            "with rollout.demonstrations.train_with 'without_demonstrations'",
        ),
        (
            [ON, "algorithm.online_dpo={}", "rollout.samples_per_prompt=2", "algorithm.advantage.estimator=rloo"],
            "with algorithm.online_dpo",
        ),
    ],
)
def test_what_excludes_it_is_refused(minimal, settings, expected):
    with pytest.raises(UserError, match=expected):
        load_config(PPOConfig, minimal, settings)


def test_the_trainers_own_experts_ask_nothing_of_the_rollout_engine(minimal):
    settings = ["environment={name: calculator}", "rollout.backend=my.engine:Engine", "rollout.tensor_parallel_size=2"]
    config = load_config(PPOConfig, minimal, [OLD, PASS, *settings])
    assert config.rollout.replays_routing
    assert not config.rollout.captures_routing
    assert train_spec(config, "policy").routing_replay
    (policy,) = (one for one in forward_passes(config, (), has_critic=False) if one.name == "policy")
    assert policy.outputs == {"logprobs", "experts"}


def test_an_evaluation_refuses_it():
    settings = [ON, "model.path=builtin:tiny", "data.path=prompts.jsonl", "reward.functions=[{name: length}]"]
    with pytest.raises(UserError, match=r"routing_replay 'rollout' has no effect without training"):
        load_config(EvaluateConfig, None, settings)


def test_the_policy_alone_replays_and_shares_no_prefixes(minimal):
    config = load_config(PPOConfig, minimal, [ON, "critic.kind=separate"])
    assert "rollout.routing_replay" in train_spec(config, "policy").unshared
    assert not train_spec(config, "critic").routing_replay
    assert "routing" in make_objectives(config)["policy"].outputs
    off = load_config(PPOConfig, minimal, [])
    assert not train_spec(off, "policy").routing_replay
    assert "routing" not in make_objectives(off)["policy"].outputs


def test_the_policy_alone_balances_its_experts_and_shares_no_prefixes(minimal):
    config = load_config(PPOConfig, minimal, ["train.router_aux_loss_coefficient=0.01", "critic.kind=separate"])
    assert "train.router_aux_loss_coefficient" in train_spec(config, "policy").unshared
    assert not train_spec(config, "critic").balances_experts
    off = train_spec(load_config(PPOConfig, minimal, []), "policy")
    assert (off.router_load, off.balances_experts, off.unshared) == (True, False, "")


def test_a_dense_policy_is_refused_before_it_loads(minimal):
    with pytest.raises(UserError, match="routing_replay: not for a llama model"):
        check_models(load_config(PPOConfig, minimal, [ON, "model.path=builtin:tiny"]))
