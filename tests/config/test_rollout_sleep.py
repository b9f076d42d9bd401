"""When replicas may sleep: on vLLM, on devices that they share, and not while they sample ahead."""

import pytest

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.errors import UserError


def test_replicas_stay_awake_unless_told(minimal):
    assert not load_config(PPOConfig, minimal).rollout.sleep
    assert load_config(PPOConfig, minimal, ["rollout.sleep=true"]).rollout.sleep


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("rollout.backend=transformers", "rollout.sleep needs rollout.backend 'vllm', found 'transformers'"),
        ("async.max_staleness=1", "rollout.sleep and async.max_staleness 1"),
        ("placement.mode=disaggregated", "placement.mode 'disaggregated'"),
    ],
)
def test_what_has_no_use_for_sleep_is_refused_in_one_line(minimal, setting, expected):
    with pytest.raises(UserError) as caught:
        load_config(PPOConfig, minimal, ["rollout.sleep=true", setting])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
