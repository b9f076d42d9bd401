"""What each role minimises, and which samples each optimizer step sees."""

import pytest

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.engines.objectives.policy import PolicyObjective, SharedObjective, ValueObjective
from rayrlhf.errors import UserError
from rayrlhf.ppo.update_objectives import learning_roles, make_objectives, plan_update

REQUIRED = ["model.path=builtin:tiny", "reward.functions=[{name: length}]", "data.train.path=prompts.jsonl"]


SINGLE = [[row] for row in range(12)]


def objectives(*overrides):
    return make_objectives(load_config(PPOConfig, None, [*REQUIRED, *overrides]))


def test_a_shared_trunk_has_one_objective_and_a_separate_critic_one_of_its_own():
    assert isinstance(objectives("critic.kind=shared")["policy"], SharedObjective)
    apart = objectives("critic.kind=separate")
    assert isinstance(apart["policy"], PolicyObjective)
    assert isinstance(apart["critic"], ValueObjective)


@pytest.mark.parametrize("setting", ["warmup_steps", "pretrain_steps"])
def test_only_the_critic_learns_during_its_warm_up(setting):
    config = load_config(PPOConfig, None, [*REQUIRED, f"critic.{setting}=2"])
    roles = [set(learning_roles(make_objectives(config), config, step)) for step in range(4)]
    assert roles == [{"critic"}, {"critic"}, {"policy", "critic"}, {"policy", "critic"}]


def test_a_critic_on_the_policys_trunk_has_no_warm_up_of_its_own():
    with pytest.raises(UserError, match="warmup_steps has no effect with kind 'shared'"):
        objectives("critic.kind=shared", "critic.warmup_steps=2")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["critic.warmup_steps=2", "critic.pretrain_steps=2"],
            "warmup_steps and pretrain_steps both let the critic train alone",
        ),
        (["critic.kind=shared", "critic.pretrain_steps=2"], "pretrain_steps has no effect with kind 'shared'"),
        (["algorithm.advantage.estimator=rloo", "algorithm.advantage.critic_lam=1"], "critic_lam has no effect with estimator"),
        (["algorithm.advantage.estimator=rloo", "algorithm.advantage.lam_alpha=1"], "lam_alpha has no effect with estimator"),
    ],
)
def test_settings_of_the_critics_lambda_without_effect_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        objectives(*overrides)


def test_value_pretraining_is_refused_with_an_estimator_that_has_no_lambda(tmp_path):
    plugin = tmp_path / "own.py"
    lines = [
        "from rayrlhf.algorithms.advantages import AdvantageMethod, zero_estimator",
        "own = AdvantageMethod(zero_estimator, True)",
    ]
    plugin.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"critic\.pretrain_steps sets GAE's lambda"):
        objectives("critic.pretrain_steps=2", f"algorithm.advantage.estimator={plugin}:own")


def test_every_epoch_sees_every_sample_once_in_an_order_of_its_own():
    plan = plan_update(SINGLE, epochs=3, mini_batch_size=4, run_seed=1, step=5)
    orders = [[row for step in epoch for row in step] for epoch in plan.epochs]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert {len(step) for epoch in plan.epochs for step in epoch} == {4}


def test_the_plan_depends_on_seed_and_step_alone():
    assert plan_update(SINGLE, 2, 4, run_seed=1, step=5) == plan_update(SINGLE, 2, 4, run_seed=1, step=5)
    assert plan_update(SINGLE, 2, 4, run_seed=1, step=5) != plan_update(SINGLE, 2, 4, run_seed=1, step=6)


def test_rows_of_one_prompt_stay_together_in_every_epoch():
    groups = [[0, 1], [2, 3, 4], [5], [6, 7]]
    for epoch in plan_update(groups, 4, 3, run_seed=2, step=0).epochs:
        order = [row for step in epoch for row in step]
        assert [len(step) for step in epoch] == [3, 3, 2]
        assert all(order[order.index(group[0]) :][: len(group)] == group for group in groups)
