"""Weights go from GPU to GPU on vLLM only: by nccl to other devices, by ipc on shared ones."""

import pytest

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.errors import UserError


def test_the_placement_chooses_the_path_of_weights_unless_told(minimal):
    assert load_config(PPOConfig, minimal).rollout.weight_transfer == "auto"
    nccl = load_config(PPOConfig, minimal, ["rollout.weight_transfer=nccl", "placement.mode=disaggregated"])
    assert nccl.rollout.weight_transfer == "nccl"
    assert load_config(PPOConfig, minimal, ["rollout.weight_transfer=ipc"]).rollout.weight_transfer == "ipc"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["nccl"], "rollout.weight_transfer 'nccl' needs placement.mode 'disaggregated', found 'colocated'"),
        (["ipc", "placement.mode=disaggregated"], "'ipc' needs placement.mode 'colocated', found 'disaggregated'"),
        (["ipc", "rollout.backend=transformers"], "'ipc' needs rollout.backend 'vllm', found 'transformers'"),
    ],
)
def test_what_cannot_be_sent_so_is_refused_in_one_line(minimal, settings, expected):
    transfer, *others = settings
    with pytest.raises(UserError) as caught:
        load_config(PPOConfig, minimal, [f"rollout.weight_transfer={transfer}", *others])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
