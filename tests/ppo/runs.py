"""Small complete PPO runs for tests: the tiny built-in model, real actors, real engines."""

import json

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.observe.metrics import read_metrics

SETTINGS = [
    "model.path=builtin:tiny?layers=2&hidden=64&context=64",
    "reward.functions=[{name: tests.ppo.runs:digit_share}]",
    "rollout.max_new_tokens=8",
    "rollout.max_model_length=64",
    "rollout.memory_gib=0.25",
    "rollout.prompts_per_step=16",
    "train.mini_batch_size=8",
    "train.learning_rate=1e-3",
    "run.steps=2",
    "checkpoint.every=0",
    "observe.live=false",
]
"""The least that makes a whole run; what is given later wins."""
TOOLS_TEMPLATE = "tests/environments/tools.jinja"


def digit_share(responses):
    """A reward with a gradient from the first step on: the share of characters that are digits."""
    return [sum(character.isdigit() for character in text) / max(len(text), 1) for text in responses]


def digit_share_by_token(responses, rollouts):
    """The same sums, in equal parts at all tokens."""
    shares = zip(digit_share(responses), (len(rollout.response_ids) for rollout in rollouts), strict=True)
    return [[share / length] * length for share, length in shares]


def shuffled_digit_share(responses):
    """The same rewards, handed to the wrong responses: what is learned from them is nothing."""
    rewards = digit_share(responses)
    return rewards[len(rewards) // 2 :] + rewards[: len(rewards) // 2]


LEARNING = [
    "rollout.backend=transformers",
    "train.mini_batch_size=16",
    "train.epochs=2",
    "train.learning_rate=3e-3",
    "algorithm.kl.coefficient=0",
    "evaluation.enabled=false",
]
"""Settings with which the tiny model learns to say digits within a few steps."""


def scores_of(config):
    """The mean score of each step."""
    return [row["objective/scores"] for row in read_metrics(config.run.folder) if "objective/scores" in row]


def write_prompts(folder, count=32):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {index}", "number": index}) + "\n" for index in range(count)))
    return path


def run_config(folder, *overrides):
    path = write_prompts(folder)
    own = [f"data.train.path={path}", f"data.evaluation.path={path}", f"run.root={folder / 'runs'}", "evaluation.prompts=8"]
    return load_config(PPOConfig, None, [*SETTINGS, *own, *overrides])


def tool_agent(name, **arguments):
    """Settings of an agent of `tests.environments.agents` whose requests have a tool; vLLM's parser reads the answers."""
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    agent = {"name": f"tests.environments.agents:{name}", "arguments": arguments | {"tools": [tool]}, "max_turn_tokens": 8}
    model = {"path": "builtin:tiny?layers=1&hidden=64&context=256", "dtype": "float32", "chat_template": TOOLS_TEMPLATE}
    sections = {"environment": agent, "model": model, "reward": {"functions": [{"name": "environment"}]}}
    limits = ["rollout.max_new_tokens=180", "rollout.max_model_length=256", "evaluation.enabled=false"]
    return [f"{key}={json.dumps(value)}" for key, value in sections.items()] + limits
