"""Configuration files of version 0.1.0 still load: copies of every file that it shipped."""

from pathlib import Path

import pytest

from rayrlhf.config.icl import ICLBuildConfig, ICLEvaluateConfig
from rayrlhf.config.launch import ClusterConfig
from rayrlhf.config.loading.kinds import config_class
from rayrlhf.config.loading.load import dump_config, load_config, stored_config
from rayrlhf.config.pipelines import ChainConfig, PreSFTConfig
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.section import Section
from rayrlhf.config.tuning import RewardTrainingConfig, SFTConfig
from rayrlhf.pipelines.chain.run_chain import load_chain, plan_chain

OLD = Path(__file__).parents[1] / "old"
FILES = sorted(str(path.relative_to(OLD)) for path in OLD.rglob("*.yaml"))
CLASSES: dict[str, type[Section]] = {
    "examples/gsm8k/sft.yaml": SFTConfig,
    "examples/gsm8k/reward.yaml": RewardTrainingConfig,
    "examples/presft/presft.yaml": PreSFTConfig,
    "examples/presft/gsm8k.yaml": PreSFTConfig,
    "examples/icl/build.yaml": ICLBuildConfig,
    "examples/icl/k-curve.yaml": ICLEvaluateConfig,
}
FILLED_IN = {"path: MODEL": "path: builtin:tiny", "PROMPTS": "16"}


def class_of(file: str) -> type[Section]:
    path = Path(file)
    if file.startswith("rayrlhf/starters"):
        return config_class(path.stem)
    if file.startswith("cluster"):
        return ClusterConfig
    if path.name == "chain.yaml" or "tools" in path.parts:
        return ChainConfig
    return CLASSES.get(file, PPOConfig)


def test_all_files_of_the_version_are_here():
    assert len(FILES) == 33


@pytest.mark.parametrize("file", FILES)
def test_an_old_file_loads(file, tmp_path):
    text = (OLD / file).read_text(encoding="utf-8")
    for old, new in FILLED_IN.items():
        text = text.replace(old, new)
    path = tmp_path / "old.yaml"
    path.write_text(text, encoding="utf-8")
    config = load_config(class_of(file), path)
    assert stored_config(class_of(file), dump_config(config)) == config


@pytest.mark.parametrize("file", [file for file in FILES if class_of(file) is ChainConfig])
def test_the_stages_of_an_old_chain_load(file, tmp_path):
    assert plan_chain(load_chain(OLD / file, [f"run.root={tmp_path}"]), (OLD / file).parent)
