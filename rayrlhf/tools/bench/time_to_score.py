"""Time to a held-out score: ours and TRL's `GRPOTrainer` on the quickstart's task.

Both learn by GRPO from the same start model, prompts, reward, LoRA adapters, optimizer and sample counts, and TRL samples with
transformers' `generate`, its default. Each run has its own process, alternately, and each round its own seed. Its clock starts
with the process, and stands still during evaluations: greedy answers to the same held-out prompts every few steps. The score is
reached at the first evaluation that has it. TRL runs without gradient checkpointing, which would make it slower.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rayrlhf.config.model import LoraSection
from rayrlhf.config.policy_loss import PPOLossSection
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.records import Prompt
from rayrlhf.data.templates import conversation
from rayrlhf.errors import UserError
from rayrlhf.library_types import PreTrainedModel
from rayrlhf.models.load import load_tokenizer
from rayrlhf.models.model_path import resolve_path
from rayrlhf.ppo.quickstart import quickstart_config
from rayrlhf.ppo.run_prompts import load_prompts
from rayrlhf.rewards.toy_word_problems import worked_answer
from rayrlhf.tools.bench.paired import Comparison, Precision, in_new_process


@dataclass(frozen=True, slots=True)
class ScoreWork:
    """A race to a score.

    Attributes:
        target: held-out score that ends a run.
        steps: maximum steps of 64 responses.
        every: steps between evaluations.
    """

    precision: Precision
    target: float
    steps: int
    every: int

    def config(self, seed: int, folder: Path) -> PPOConfig:
        """Return our configuration, which TRL's settings follow."""
        own = [
            f"model.dtype={self.precision}",
            f"run={{seed: {seed}, steps: {self.steps}, root: {folder}}}",
            f"evaluation.every={self.every}",
            "observe.live=false",
        ]
        return quickstart_config(own, "grpo")


@dataclass
class Curve:
    """Held-out scores over training time.

    Attributes:
        points: step, seconds since the process began without evaluations, score.
    """

    points: list[tuple[int, float, float]] = field(default_factory=list)

    def reached(self, target: float) -> tuple[int, float, float] | None:
        """Return the first point after the start with this score."""
        return next((point for point in self.points if point[0] > 0 and point[2] >= target), None)

    def __str__(self) -> str:
        return ", ".join(f"step {step} at {seconds:.0f} s: {score:.3f}" for step, seconds, score in self.points)


class Clock:
    """Records a curve; stands still from the last `stop` to `record`."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._stopped = self._started
        self.curve = Curve()

    def stop(self) -> None:
        """Stand still if `record` follows."""
        self._stopped = time.perf_counter()

    def record(self, step: int, score: float) -> None:
        """Add a point, and run again."""
        self.curve.points.append((step, self._stopped - self._started, score))
        self._started += time.perf_counter() - self._stopped


def bench_score(work: ScoreWork, *, rounds: int, progress: Callable[[str], None] = lambda _: None) -> list[Comparison]:
    """Run both trainers.

    Returns:
        Scores reached per hour, from the start of the process and from the first step.

    Raises:
        UserError: TRL is not installed, or a run did not reach the score.
    """
    try:
        import trl
    except ImportError as error:
        raise UserError("bench score: TRL is not installed; expected `pip install 'rayrlhf[test]'`") from error
    contenders = {f"TRL {trl.__version__} GRPOTrainer": _run_trl, "rayrlhf": _run_ours}
    whole: dict[str, list[float]] = {name: [] for name in contenders}
    steps: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            curve = in_new_process(contenders[name], work, number)
            progress(f"seed {number}: {name}: {curve}")
            found = curve.reached(work.target)
            if found is None:
                raise UserError(
                    f"bench score: {name} did not reach {work.target:g} in {work.steps} steps; expected more --steps"
                )
            whole[name].append(3600 / found[1])
            steps[name].append(3600 / (found[1] - curve.points[0][1]))
    title = f"Held-out score of {work.target:g} on the quickstart's task, GRPO, {work.precision}"
    return [
        Comparison(f"{title}, with the start", "times/h", whole),
        Comparison(f"{title}, without the start", "times/h", steps),
    ]


class _ReachedError(Exception):
    """Ends our run."""


def _run_ours(work: ScoreWork, seed: int) -> Curve:
    clock = Clock()
    from rayrlhf.ppo.callbacks import Callback
    from rayrlhf.ppo.train_ppo import train_ppo

    class Race(Callback):
        def on_start(self, trainer: Any) -> None:
            clock.stop()

        def on_step_end(self, step: int, metrics: Mapping[str, float], scored: Any) -> None:
            clock.stop()

        def on_evaluation(self, step: int, evaluation: Any) -> None:
            clock.record(step, float(np.mean(evaluation.rewards.scores)))
            if clock.curve.reached(work.target):
                raise _ReachedError

    with tempfile.TemporaryDirectory() as folder, suppress(_ReachedError):
        train_ppo(work.config(seed, Path(folder)), [Race()])
    return clock.curve


def trl_settings(config: PPOConfig) -> dict[str, Any]:
    """Return keyword arguments of TRL's `GRPOConfig` for our configuration."""
    train, rollout, loss = config.train, config.rollout, config.algorithm.policy_loss
    assert isinstance(loss, PPOLossSection)
    first, second = train.optimizer.betas
    return {
        "bf16": config.model.dtype == "bfloat16",
        "seed": config.run.seed,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.schedule.shape,
        "adam_beta1": first,
        "adam_beta2": second,
        "adam_epsilon": train.optimizer.epsilon,
        "weight_decay": train.optimizer.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "num_iterations": train.epochs,
        "per_device_train_batch_size": config.mini_batch_size,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": config.updates_per_step,
        "max_steps": config.run.steps * config.updates_per_step,
        "num_generations": rollout.samples_per_prompt,
        "max_completion_length": rollout.max_new_tokens,
        "temperature": rollout.temperature,
        "beta": config.algorithm.kl.coefficient,
        "epsilon": loss.clip_low,
        "epsilon_high": loss.clip_high,
        "loss_type": "grpo",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def lora_settings(adapters: LoraSection | None, network: PreTrainedModel) -> dict[str, Any]:
    """Return keyword arguments of peft's `LoraConfig` for our adapters."""
    assert adapters is not None
    assert adapters.last_layers is not None
    layers, output = network.config.num_hidden_layers, network.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and module is not output
    }
    return {
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(linear),
        "layers_to_transform": list(range(layers - adapters.last_layers, layers)),
        "task_type": "CAUSAL_LM",
    }


def trl_rows(prompts: Sequence[Prompt], config: PPOConfig) -> list[dict[str, Any]]:
    """Return prompts as rows of TRL's dataset."""
    return [
        {
            "prompt": conversation(prompt.text, config.data.system_prompt),
            "answer": str(prompt.columns["answer"]),
            "solution": prompt.columns["solution"],
        }
        for prompt in prompts
    ]


def _run_trl(work: ScoreWork, seed: int) -> Curve:
    clock = Clock()
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        config = work.config(seed, Path(folder))
        tokenizer = load_tokenizer(config.model)
        train, held_out = load_prompts(config)
        model = AutoModelForCausalLM.from_pretrained(resolve_path(config.model), dtype=torch.float32)

        def reward(completions: Any, completion_ids: Any, answer: Any, solution: Any, **_: object) -> list[float]:
            ends = ["stop" if ids[-1] == tokenizer.eos_token_id else "length" for ids in completion_ids]
            return worked_answer([messages[0]["content"] for messages in completions], answer, solution, ends)

        class Race(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, arguments: Any, state: Any, control: Any, **_: object) -> None:
                step, rest = divmod(state.global_step, config.updates_per_step)
                if rest == 0 and step % work.every == 0:
                    clock.stop()
                    clock.record(step, _held_out_score(trainer.model, tokenizer, held_out, config))
                    control.should_training_stop = clock.curve.reached(work.target) is not None

        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=GRPOConfig(output_dir=folder, use_cpu=not torch.cuda.is_available(), **trl_settings(config)),
            train_dataset=Dataset.from_list(trl_rows(train, config)),
            processing_class=tokenizer,
            callbacks=[Race()],
            peft_config=LoraConfig(**lora_settings(config.model.lora, model)),
        )
        clock.stop()
        clock.record(0, _held_out_score(trainer.model, tokenizer, held_out, config))
        trainer.train()
    return clock.curve


def _held_out_score(model: Any, tokenizer: Any, prompts: Sequence[Prompt], config: PPOConfig) -> float:
    """Return the mean reward of greedy answers."""
    width = max(len(prompt.token_ids) for prompt in prompts)
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.token_ids) :] = torch.from_numpy(prompt.token_ids).long()
        mask[row, width - len(prompt.token_ids) :] = 1
    training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=config.model.dtype == "bfloat16"):
        answers = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=config.rollout.max_new_tokens, do_sample=False
        )[:, width:]
    model.train(training)
    ends = ["stop" if tokenizer.eos_token_id in row.tolist() else "length" for row in answers]
    columns = [prompt.columns for prompt in prompts]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    right, work = [row["answer"] for row in columns], [row["solution"] for row in columns]
    return float(np.mean(worked_answer(texts, right, work, ends)))
