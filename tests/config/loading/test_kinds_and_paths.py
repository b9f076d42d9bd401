"""Files given to the wrong command, and paths with `~` and environment variables."""

import pytest

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.tuning import SFTConfig
from rayrlhf.errors import UserError

PPO = """
model: {path: m, lora: {rank: 4}}
reward: {functions: [{name: length}]}
data: {train: {path: $PLACE/prompts.jsonl}}
"""
SFT = """
model: {path: m}
data: {train: {path: texts.jsonl}}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", "/data")

    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_a_ppo_file_given_to_sft_is_named_as_one(write):
    with pytest.raises(UserError, match=r"run\.yaml: a configuration of `rayrlhf ppo`, not of `rayrlhf sft`"):
        load_config(SFTConfig, write(PPO))


def test_a_mistake_in_the_right_kind_of_file_keeps_its_own_line(write):
    with pytest.raises(UserError, match=r"train\.learnign_rate: unknown key; did you mean train\.learning_rate\?"):
        load_config(PPOConfig, write(PPO + "train: {learnign_rate: 1}\n"))
    with pytest.raises(UserError, match=r"run\.steps: unknown key; did you mean"):
        load_config(SFTConfig, write(SFT + "run: {steps: 5}\n"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.lora.targets=[q_proj]", r"unknown key; did you mean model\.lora\.target_modules\?"),
        ("rollout.stop=[eos]", r"'eos' names the end-of-sequence token, which always ends a response: remove it"),
        ("rollout.stop=['<|eos|>']", "names the end-of-sequence token"),
        ("run.root=$NOT_SET_ANYWHERE/runs", r"environment variable \$NOT_SET_ANYWHERE is not set"),
        ("rollout={max_model_length: 8, max_new_tokens: 8}", "cannot hold a prompt and rollout.max_new_tokens 8$"),
    ],
)
def test_messages_name_the_right_key(write, setting, message):
    with pytest.raises(UserError, match=message):
        load_config(PPOConfig, write(PPO), [setting])


def test_home_and_variables_are_expanded_at_the_start_of_values_only(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(PPOConfig, write(PPO), ["run.root=~/runs", "rollout.stop=['costs $PLACE/x', '~']"])
    assert str(config.run.root) == "/home/me/runs"
    assert config.data.train.path == "/data/prompts.jsonl"
    assert config.rollout.stop[0] == "costs $PLACE/x"
