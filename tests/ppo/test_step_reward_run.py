"""A run that is rewarded by a process reward model: settings that do not fit."""

import pytest

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.errors import UserError
from tests.ppo.runs import SETTINGS


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.shaping.scale=true"], r"switch them off, or set per to 'response' for reward\.model\.steps"),
        (["environment={name: calculator}"], r"reward\.model\.steps\.per 'step' pays no steps of turns in an environment"),
    ],
)
def test_settings_that_do_not_fit_payments_of_steps_are_refused(overrides, message):
    own = ["data.train.path=rows.jsonl", "reward.model={model: {path: m}, steps: {}}", "evaluation.enabled=false"]
    with pytest.raises(UserError, match=message):
        load_config(PPOConfig, None, [*SETTINGS, *own, *overrides])
    load_config(PPOConfig, None, [*SETTINGS, *own, *overrides, "reward.model.steps.per=response"])
