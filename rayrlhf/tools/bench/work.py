"""PPO job of the benchmarks, and the actors of a small run without its loop."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from rayrlhf.actors.connection import connected, running_actor_groups
from rayrlhf.actors.model_loading import load_models
from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.train import SharePrefixes
from rayrlhf.data.prompt_sampler import PromptSampler
from rayrlhf.data.records import Prompt
from rayrlhf.data.toy.word_problems import generate
from rayrlhf.models.load import load_tokenizer
from rayrlhf.ppo.step_driver import StepDriver
from rayrlhf.tools.bench.paired import Precision

Critic = Literal["separate", "shared"]
Record = Literal["off", "light", "full"]
PROBLEMS = 4
"""Word problems of a prompt, before it is cut to its length."""


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
        record: `observe.record` of our runs.
        samples: responses per prompt; several make our runs take group-normalized advantages.
        share_prefixes: `train.share_prefixes` of our runs.
        characters: shortest and longest prompt.
    """

    policy: str
    reward: str
    precision: Precision
    prompts: int = 64
    new_tokens: int = 64
    epochs: int = 4
    updates: int = 3
    lora: int = 0
    record: Record = "off"
    samples: int = 1
    share_prefixes: SharePrefixes = "auto"
    characters: tuple[int, int] = (32, 96)

    def texts(self) -> list[str]:
        """Return the prompts of all steps, the first included."""
        count = self.prompts * (self.updates + 1)
        lengths = np.random.default_rng(0).integers(self.characters[0], self.characters[1] + 1, count)
        problems = [f"{row['solution']} {row['question']} " for row in generate(0, count * PROBLEMS, "train")]
        return ["".join(problems[number::count]).strip()[-length:] for number, length in enumerate(lengths)]

    def write_prompts(self, folder: Path) -> None:
        """Write the prompts to the file that `config` reads."""
        rows = "".join(json.dumps({"prompt": text}) + "\n" for text in self.texts())
        (folder / "prompts.jsonl").write_text(rows, encoding="utf-8")

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
                f"rollout={{prompts_per_step: {self.prompts}, samples_per_prompt: {self.samples}, "
                f"max_new_tokens: {self.new_tokens}, max_model_length: {max(256, self.characters[1] + self.new_tokens)}}}",
                f"train={{epochs: {self.epochs}, learning_rate: 1.0e-5, share_prefixes: {self.share_prefixes}}}",
                f"run={{name: bench, root: {json.dumps(str(folder))}, steps: {self.updates + 1}}}",
                "evaluation.every=0",
                "checkpoint.every=0",
                "observe.live=false",
                f"observe.record={self.record}",
                *(["algorithm.advantage.estimator=grpo"] if self.samples > 1 else []),
                *own_critic.get(critic, [f"critic.kind={critic}"] if critic != "none" else []),
            ],
        )


def bench_config(overrides: Sequence[str]) -> PPOConfig:
    """Return a configuration without data, reference or critic; prompts are passed directly."""
    base = [
        "run.name=bench",
        "data.train.path=none",
        "reward.functions=[{name: format, arguments: {pattern: x}}]",
        "algorithm={kl: {coefficient: 0.0}, advantage: {estimator: reinforce}}",
    ]
    return load_config(PPOConfig, None, [*base, *overrides])


@contextmanager
def running_trainer(config: PPOConfig) -> Iterator[StepDriver]:
    """Start Ray and the actors with their models for the duration of the block."""
    with connected(config.placement.address), running_actor_groups(config) as actor_groups:
        load_models(actor_groups, config.deadlines.start)
        yield StepDriver(config, actor_groups, PromptSampler([Prompt(0, "", np.zeros(1, np.int32))], seed=0))
