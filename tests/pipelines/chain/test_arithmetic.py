"""The example chain from random weights to PPO: a learned reward alone improves what careless demonstrations left."""

import json
import re
from pathlib import Path

import pytest

from rayrlhf.pipelines.chain.run_chain import load_chain, run_chain

CHAIN = Path(__file__).parents[3] / "examples" / "arithmetic" / "chain.yaml"


@pytest.mark.nightly
def test_ppo_on_the_learned_reward_adds_15_points_to_sft_and_a_second_start_does_nothing(tmp_path):
    config = load_chain(CHAIN, [f"run.root={tmp_path}"])
    first = run_chain(config, CHAIN.parent)
    accuracy = {report.name: float(re.search(r"gsm8k ([0-9.]+)", report.headline).group(1)) for report in first[1::3]}
    assert list(accuracy) == ["after-sft", "after-ppo"]
    assert accuracy["after-ppo"] >= accuracy["after-sft"] + 0.15, first
    statistics = json.loads((tmp_path / "arithmetic" / "reward" / "export" / "reward_statistics.json").read_text())
    assert statistics["evaluation/accuracy"] > 0.85
    again = run_chain(config, CHAIN.parent)
    assert all(report.skipped for report in again)
    assert [report.headline for report in again] == [report.headline for report in first]
