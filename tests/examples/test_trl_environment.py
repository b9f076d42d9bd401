"""TRL-style environments and tools as agents: what the policy reads and earns is what TRL's trainer gives it."""

from copy import deepcopy

import pytest

from rayrlhf.config.rollout import EnvironmentSection
from rayrlhf.environments.chat_tokens import ChatTokens
from rayrlhf.environments.players.agent_player import AgentPlayer
from rayrlhf.environments.players.agent_session import Texts
from rayrlhf.environments.registry import find_agent
from rayrlhf.errors import UserError
from tests.environments.chat_families import families, tokenizer_of
from tests.environments.players.test_agent_player import request
from tests.environments.players.test_agent_tools import TEXTS, TOKENIZER, Hermes, spoken, trained_once
from tests.environments.sample_players import Scripted
from tests.environments.test_tool_use import called, observed

PATH = "examples/agents/trl_environment.py"


class Counter:
    """An environment in the form of TRL's documentation."""

    def reset(self, answer, **row):
        self.value, self.answer = 0, answer
        return f" count to {answer}"

    def increment(self, step: int) -> str:
        """Increment the counter.

        Args:
            step: amount to add.

        Returns:
            The new value.
        """
        if step < 1:
            raise ValueError("step must be positive")
        self.value += step
        return str(self.value)

    def get_reward(self):
        return float(self.value == int(self.answer))


async def double(number: int) -> int:
    """Double a number.

    Args:
        number: any number.
    """
    return 2 * number


SAID = [called("increment", step=2), called("increment", step=0), called("double", number=4), called("increment", step=3)]
SAID.append(spoken("done"))
HERE = "tests.examples.test_trl_environment"


def play(arguments, said, texts):
    limits = EnvironmentSection.model_validate({"name": f"{PATH}:play", "arguments": arguments})
    scripted = Scripted(said, texts.tokenizer)
    engine = AgentPlayer(scripted, find_agent(limits), limits, texts)
    try:
        engine.submit([request(answer="5")], temperature=1.0, max_new_tokens=5000)
        (rollout,) = engine.poll(1)
    finally:
        engine.close()
    trained_once(rollout, scripted, said)
    return rollout


def test_methods_and_functions_are_tools_and_the_environments_reward_is_that_of_the_sample():
    rollout = play({"make": f"{HERE}:Counter", "tools": [f"{HERE}:double"]}, list(SAID), TEXTS)
    assert (rollout.failure, float(rollout.rewards.sum())) == ("", 1.0)
    assert "ask count to 5" in TOKENIZER.decode(rollout.prompt_ids)
    assert all(part in observed(rollout) for part in ("\n2\n", "{'error': 'step must be positive'}", "\n8\n", "\n5\n"))


def test_tools_need_no_environment_and_one_of_both_is_needed():
    rollout = play({"tools": [f"{HERE}:double"]}, [called("double", number=4), spoken("8")], TEXTS)
    assert (rollout.failure, float(rollout.rewards.sum())) == ("", 0.0)
    with pytest.raises(UserError, match="expected make or tools, found neither"):
        play({}, [], TEXTS)


@pytest.mark.slow
def test_tokens_masks_and_reward_are_those_of_trls_trainer(tmp_path, monkeypatch):
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import GRPOConfig, GRPOTrainer
    from trl.chat_template_utils import get_training_chat_template

    tokenizer, _ = tokenizer_of("qwen3", families()["qwen3"])
    training = deepcopy(tokenizer)
    training.chat_template = get_training_chat_template(tokenizer)  # the trainer renders with it
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=9000, **shape))
    settings = {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 5000, "use_cpu": True}
    trainer = GRPOTrainer(
        model,
        args=GRPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False, **settings),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "ask"}], "answer": "5"}]),
        processing_class=tokenizer,
        environment_factory=Counter,
        tools=[double],
    )
    turns = iter(SAID)

    def scripted(prompt_ids, *rest, **keys):
        said = next(turns)
        return [list(said) for _ in prompt_ids], None

    monkeypatch.setattr(trainer, "_generate_single_turn", scripted)
    row = {"prompt": [{"role": "user", "content": "ask"}], "answer": "5"}
    theirs = trainer._generate_and_score_completions([row, row])
    texts = Texts(training, ChatTokens(training), Hermes())
    ours = play({"make": f"{HERE}:Counter", "tools": [f"{HERE}:double"]}, list(SAID), texts)
    assert ours.prompt_ids.tolist() == theirs["prompt_ids"][0].tolist()
    assert ours.response_ids.tolist() == theirs["completion_ids"][0].tolist()
    assert ours.action_mask.tolist() == theirs["tool_mask"][0].bool().tolist()
    assert float(ours.rewards.sum()) == trainer._logs["rewards"]["Counter"][0] == 1.0
