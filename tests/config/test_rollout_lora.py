"""Settings of `rollout.lora` that do not fit the rest are refused."""

import pytest

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.errors import UserError

LORA = "model.lora={rank: 8}"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["rollout.lora=adapter"], "rollout.lora 'adapter' needs adapters (model.lora)"),
        (
            ["model.lora={}", "rollout.lora=adapter", "rollout.pipeline_parallel_size=2"],
            "rollout.lora 'adapter' with rollout.pipeline_parallel_size 2: an adapter is read from one node's memory",
        ),
        (["rollout.lora=adapter", LORA, "rollout.backend=transformers"], "needs rollout.backend 'vllm', found 'transformers'"),
    ],
)
def test_adapters_that_cannot_be_served_are_refused_in_one_line(minimal, settings, expected):
    with pytest.raises(UserError) as caught:
        load_config(PPOConfig, minimal, settings)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
