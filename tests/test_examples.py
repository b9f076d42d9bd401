"""Every example in the tree is a configuration that loads."""

from pathlib import Path

import pytest

from rayrlhf.config.load import load_config
from rayrlhf.config.ppo import PPOConfig

ROOT = Path(__file__).parent.parent
PPO_FILES = [*sorted((ROOT / "examples").glob("gsm8k/*.yaml")), ROOT / "rayrlhf" / "ppo" / "quickstart.yaml"]


@pytest.mark.parametrize("path", PPO_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_an_example_is_a_valid_configuration(path):
    config = load_config(PPOConfig, path, [])
    assert config.samples_per_step % config.mini_batch_size == 0
