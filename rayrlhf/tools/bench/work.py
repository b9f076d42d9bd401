"""PPO job of the benchmarks, the same for every contender."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.toy.word_problems import generate
from rayrlhf.models.load import load_tokenizer
from rayrlhf.tools.bench.paired import Precision

Critic = Literal["separate", "shared"]
MIN_CHARACTERS, MAX_CHARACTERS = 32, 96
"""Length of a prompt in characters."""


@dataclass(frozen=True, slots=True)
class PPOWork:
    """A PPO job.

    Attributes:
        policy: path of the policy, reference and (with a new head) critic; a folder.
        reward: path of a sequence classifier of one label; a folder.
        precision: compute precision; weights and optimizer stay in float32.
        prompts: prompts of a step, one response each, all in one mini-batch.
        new_tokens: maximum response length in tokens.
        epochs: optimizer steps per batch.
        updates: timed PPO steps.
        lora: rank of adapters on all linear layers of the policy, whose reference is then the policy without them; 0 for none.
    """

    policy: str
    reward: str
    precision: Precision
    prompts: int = 64
    new_tokens: int = 64
    epochs: int = 4
    updates: int = 3
    lora: int = 0

    def texts(self) -> list[str]:
        """Return the prompts of all steps, the first included."""
        count = self.prompts * (self.updates + 1)
        lengths = np.random.default_rng(0).integers(MIN_CHARACTERS, MAX_CHARACTERS + 1, count)
        rows = zip(generate(0, count, "train"), lengths, strict=True)
        return [f"{row['solution']} {row['question']}"[-length:] for row, length in rows]

    def token_ids(self) -> list[list[int]]:
        """Return the prompts as token ids."""
        ids: list[list[int]] = load_tokenizer(self.config("none", Path()).model)(self.texts())["input_ids"]
        return ids

    def config(self, critic: str, folder: Path) -> PPOConfig:
        """Return the job as a configuration."""
        adapters = f", lora: {{rank: {self.lora}, alpha: {2 * self.lora}}}" if self.lora else ""
        own_critic = {
            "separate": [f"critic={{kind: separate, model: {{path: {json.dumps(self.policy)}, dtype: {self.precision}}}}}"]
        }
        return load_config(
            PPOConfig,
            None,
            [
                f"model={{path: {json.dumps(self.policy)}, dtype: {self.precision}{adapters}}}",
                f"reward.model.model={{path: {json.dumps(self.reward)}, dtype: {self.precision}}}",
                'reward.model.template="{prompt}{response}"',
                f"data={{chat: false, train: {{path: {json.dumps(str(folder / 'prompts.jsonl'))}}}}}",
                f"rollout={{prompts_per_step: {self.prompts}, max_new_tokens: {self.new_tokens}, max_model_length: 256}}",
                f"train={{epochs: {self.epochs}, learning_rate: 1.0e-5}}",
                f"run={{name: bench, root: {json.dumps(str(folder))}, steps: {self.updates + 1}}}",
                "evaluation.every=0",
                "checkpoint.every=0",
                "observe.live=false",
                *own_critic.get(critic, [f"critic.kind={critic}"] if critic != "none" else []),
            ],
        )
