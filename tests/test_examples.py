"""Every example in the tree is a configuration that loads."""

import re
from pathlib import Path

import pytest

from rayrlhf.config.icl import ICLBuildConfig, ICLEvaluateConfig
from rayrlhf.config.loading.load import load_config
from rayrlhf.config.pipelines import PreSFTConfig
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.tuning import RewardTrainingConfig, SFTConfig
from rayrlhf.data.toy.played_turns import calculations
from rayrlhf.models.tiny import END, TinyOptions, byte_tokenizer
from rayrlhf.pipelines.chain.run_chain import load_chain, plan_chain

ROOT = Path(__file__).parent.parent
PPO_FILES = [
    "examples/from_trl/classic.yaml",
    "examples/from_trl/modern.yaml",
    "examples/grpo/grpo.yaml",
    "examples/gsm8k/cpu.yaml",
    "examples/gsm8k/ppo.yaml",
    "rayrlhf/ppo/quickstart.yaml",
]
OTHER_FILES = {
    "examples/gsm8k/sft.yaml": SFTConfig,
    "examples/gsm8k/reward.yaml": RewardTrainingConfig,
    "examples/presft/presft.yaml": PreSFTConfig,
    "examples/presft/gsm8k.yaml": PreSFTConfig,
    "examples/icl/k-curve.yaml": ICLEvaluateConfig,
    "examples/icl/build.yaml": ICLBuildConfig,
}
CHAINS = [
    "examples/agents/calculator.yaml",
    "examples/arithmetic/chain.yaml",
    "examples/distillation/chain.yaml",
    "examples/dpo/chain.yaml",
    "examples/icl/chain.yaml",
    "examples/long_context/chain.yaml",
    "examples/moe/chain.yaml",
    "examples/preferences/chain.yaml",
    "examples/preferences/tiny.yaml",
    "examples/rft/chain.yaml",
    "examples/tools/agent.yaml",
    "examples/tools/calculator.yaml",
    "examples/tools/guessing.yaml",
]


@pytest.mark.parametrize("path", PPO_FILES)
def test_an_example_of_ppo_is_a_valid_configuration_whose_batches_divide(path):
    config = load_config(PPOConfig, ROOT / path, [])
    assert config.samples_per_step % config.mini_batch_size == 0


@pytest.mark.parametrize("path", OTHER_FILES)
def test_an_example_is_a_valid_configuration(path):
    load_config(OTHER_FILES[path], ROOT / path, [])


@pytest.mark.parametrize("path", CHAINS)
def test_the_stages_of_an_example_fit_together(path, tmp_path):
    assert plan_chain(load_chain(ROOT / path, [f"run.root={tmp_path}"]), (ROOT / path).parent)


def test_the_built_in_models_of_examples_have_options_that_exist():
    paths = {
        path for file in (ROOT / "examples").rglob("*.yaml") for path in re.findall(r'builtin:tiny[^"\s]*', file.read_text())
    }
    assert len(paths) > 3
    for path in paths:
        TinyOptions.parse(path.partition("?")[2], path)


def test_the_limits_of_the_agent_leave_space_for_every_call_and_answer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (ROOT / "examples/agents/tools.jinja").read_text()
    chain = load_chain(ROOT / "examples/agents/calculator.yaml")
    stages = {stage.name: stage.settings for stage in chain.stages}
    turns, conversations = [], []
    for row in calculations(0, 400, "train", calls=100, chat=1, lookups=50):
        text = tokenizer.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False)
        _, *answers = text.split("<|im_start|>a\n")
        turns += [len(tokenizer.encode(answer.partition(END)[0])) + 1 for answer in answers]
        response = text.partition("<|im_start|>a\n")[2].removesuffix("\n")
        conversations.append(len(tokenizer.encode(response)))
    assert len(turns) == 2 * len(conversations)
    for name in ("after-sft", "ppo"):
        assert stages[name]["environment"]["max_turn_tokens"] >= max(turns)
        assert stages[name]["rollout"]["max_new_tokens"] >= max(conversations)


def test_no_example_is_left_out():
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "examples").rglob("*.yaml")}
    assert found == {path for path in (*PPO_FILES, *OTHER_FILES, *CHAINS) if path.startswith("examples/")}
