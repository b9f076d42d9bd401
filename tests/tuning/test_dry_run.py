"""The plan of a run on Ray Train says how its model computes samples."""

import pytest

from rayrlhf.tuning.train_model import check_dpo, check_reward, check_sft
from tests.tuning.runs import dpo_config, reward_config, sft_config


@pytest.mark.parametrize(
    ("check", "config", "settings", "outcome"),
    [
        (check_sft, sft_config, [], "samples may be packed and share prefixes"),
        (check_sft, sft_config, ["train.neftune_alpha=5"], "differs between samples (train.neftune_alpha)"),
        (
            check_reward,
            reward_config,
            ["train.share_prefixes=off"],
            "may be packed, prefixes are not shared: train.share_prefixes is off",
        ),
        (
            check_dpo,
            dpo_config,
            ["workers={count: 2, sequence_parallel: 2}"],
            "not shared: ranks share rows (sequence_parallel)",
        ),
    ],
    ids=["sft", "noise", "reward", "dpo"],
)
def test_a_dry_run_tells_whether_prefixes_are_shared(tmp_path, check, config, settings, outcome):
    (line,) = (line for line in check(config(tmp_path, *settings)).splitlines() if line.startswith("model: llama"))
    assert line.endswith(outcome)
