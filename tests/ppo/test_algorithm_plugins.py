"""A loss, an advantage estimator and a KL estimator from a file: found by the config, checked at the start, used in a run."""

import numpy as np
import pytest

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.errors import UserError
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.experience import ExperienceMaker
from rayrlhf.ppo.train_ppo import train_ppo
from rayrlhf.ppo.update_objectives import check_algorithm
from tests.ppo.runs import run_config
from tests.ppo.test_experience import GROUPED, load, two_prompts

PLUGINS = """\
import torch
from rayrlhf.algorithms.estimator import AdvantageMethod, Advantages
from rayrlhf.algorithms.losses import TokenLoss


def centered(inputs, *, gamma, lam, skip_masked, scale=1.0):
    return Advantages(inputs.broadcast(scale * (inputs.scores - inputs.scores.mean())), None)


pairs = AdvantageMethod(centered, smallest_group=2)


def capped(log_ratio, *, limit):
    return log_ratio.clamp(-limit, limit)


def rollout_weighted(inputs, *, bound):
    assert inputs.rollout_logprobs is not None and inputs.values is None
    weight = (inputs.logprobs - inputs.rollout_logprobs).detach().exp().clamp(max=bound)
    loss = -weight * inputs.advantages * inputs.logprobs
    return TokenLoss(loss, {"loss/own": weight})
"""


@pytest.fixture
def plugins(tmp_path):
    path = tmp_path / "plugins.py"
    path.write_text(PLUGINS)
    return path


def test_an_estimator_and_a_kl_from_a_file_make_the_experience(plugins):
    config = load(
        *GROUPED,
        f"algorithm.advantage={{estimator: '{plugins}:centered', arguments: {{scale: 2.0}}}}",
        f"algorithm.policy_loss={{name: '{plugins}:rollout_weighted', arguments: {{bound: 2.0}}}}",
    )
    check_algorithm(config.algorithm)
    assert config.critic.kind == "none"
    arrays = ExperienceMaker(config).make(two_prompts([1.0, 3.0, 5.0, 5.0])).batch.arrays
    assert arrays["advantages"][:, 0].tolist() == [-5.0, -1.0, 3.0, 3.0]
    assert set(arrays) == {"old_logprobs", "advantages", "action_mask", "rollout_logprobs"}
    np.testing.assert_array_equal(arrays["rollout_logprobs"], arrays["old_logprobs"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("policy_loss={name: 'FILE:rollout_weigthed'}", "has no function 'rollout_weigthed'; did you mean 'rollout_weighted'"),
        (
            "policy_loss={name: 'FILE:rollout_weighted', arguments: {bounds: 2}}",
            "takes no argument 'bounds'; did you mean 'bound'",
        ),
        ("policy_loss={name: 'FILE:rollout_weighted'}", "argument: 'bound'"),
        ("policy_loss.name='no/such.py:loss'", "no/such.py: no such file"),
        ("kl={estimator: 'FILE:capped', arguments: {limt: 2}}", "takes no argument 'limt'; did you mean 'limit'"),
        ("advantage={estimator: 'FILE:centered', arguments: {scael: 2}}", "takes no argument 'scael'; did you mean 'scale'"),
    ],
)
def test_a_wrong_plugin_is_one_line_before_anything_starts(plugins, setting, message):
    config = load(*GROUPED, f"algorithm.{setting}".replace("FILE", str(plugins)))
    with pytest.raises(UserError) as caught:
        check_algorithm(config.algorithm)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_requirements_of_an_estimator_from_a_file_are_checked(plugins):
    required = ["model.path=builtin:tiny", "reward.functions=[{name: length}]", "data.train.path=prompts.jsonl"]
    with pytest.raises(UserError, match=r"compares responses to one prompt: set rollout\.samples_per_prompt to 2 or more"):
        load_config(PPOConfig, None, [*required, f"algorithm.advantage.estimator={plugins}:pairs"])


@pytest.mark.nightly
def test_a_loss_from_a_file_trains_in_the_actor_processes(plugins, tmp_path):
    config = run_config(
        tmp_path,
        "rollout.backend=transformers",
        f"algorithm.policy_loss={{name: '{plugins}:rollout_weighted', arguments: {{bound: 2.0}}}}",
        f"algorithm.advantage.estimator={plugins}:centered",
        f"algorithm.kl={{estimator: '{plugins}:capped', arguments: {{limit: 1.0}}, placement: loss}}",
        "evaluation.enabled=false",
    )
    train_ppo(config)
    rows = [row for row in read_metrics(config.run.folder) if "lr" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["loss/own"] == pytest.approx(1.0, abs=0.05)
        assert np.isfinite(row["policy/grad_norm"])
