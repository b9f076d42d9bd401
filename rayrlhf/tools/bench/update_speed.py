"""`rayrlhf bench train`: optimizer step of our policy actor compared with plain torch.

Both have float32 weights, use autocast for bfloat16, torch's fused AdamW and all threads, and are kept alive between runs; one
works at a time. The plain step pads rows of similar length together and applies the output layer from the shortest prompt's end
on; its loss is a mean of squares, of negligible cost.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch

from rayrlhf.actors.remote import put
from rayrlhf.config.model import ModelSection
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.records import TokenSequence
from rayrlhf.data.toy.word_problems import generate
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.models.load import load_tokenizer, resolve_dtype
from rayrlhf.models.model_path import resolve_path
from rayrlhf.ppo.update_objectives import make_objectives
from rayrlhf.tools.bench.paired import Comparison, compare
from rayrlhf.tools.bench.work import bench_config, running_trainer

MAX_PROBLEMS = 8
"""Maximum word problems per sample: some 300 tokens."""


def bench_training(model: str, *, samples: int, rounds: int, progress: Callable[[str], None] = lambda _: None) -> Comparison:
    """Compare a plain torch step with ours.

    Returns:
        Prompt and response tokens per second, with the plain step as the baseline.
    """
    config = bench_config([f"model.path={model}", "rollout={max_new_tokens: 8, max_model_length: 128, memory_gib: 0.25}"])
    batch = word_problem_batch(config, samples)
    tokens = sum(batch.lengths)
    with running_trainer(config) as trainer:
        threads = trainer.actor_groups.plan.workers["policy"][0].threads
        plain = ray.remote(PlainTrainer).options(num_cpus=0).remote(config.model, list(batch.sequences), threads)
        objective = make_objectives(config)["policy"]
        plan = UpdatePlan([[list(range(samples))]])
        reference = put(batch)

        def ours() -> float:
            policy = trainer.actor_groups["policy"]
            started = time.perf_counter()
            policy.wait(policy.update(reference, plan, objective), "update", config.deadlines.update)
            return tokens / (time.perf_counter() - started)

        contenders: dict[str, Callable[[], float]] = {
            "plain torch step": lambda: float(ray.get(plain.speed.remote())),
            "rayrlhf policy update": ours,
        }
        for warm in contenders.values():
            warm()
        title = f"optimizer step on {samples} samples of {tokens:,} tokens, {model}, {threads} threads"
        return compare(title, "tokens/s", contenders, rounds, progress)


def word_problem_batch(config: PPOConfig, samples: int) -> TrainingBatch:
    """Return two to eight word problems per sample, with synthetic experience."""
    tokenizer = load_tokenizer(config.model)
    problems = iter(generate(0, samples * MAX_PROBLEMS, "train"))
    sequences = []
    for count in np.random.default_rng(0).integers(2, MAX_PROBLEMS + 1, samples):
        rows = [next(problems) for _ in range(count)]
        prompt, response = (tokenizer("\n".join(row[name] for row in rows))["input_ids"] for name in ("question", "solution"))
        sequences.append(TokenSequence(np.array([*prompt, *response], dtype=np.int32), len(prompt)))
    lengths = np.array([sequence.response_length for sequence in sequences])
    shape = (samples, int(lengths.max()))
    arrays: dict[str, Any] = {
        "old_logprobs": np.full(shape, -1.0, dtype=np.float32),
        "advantages": np.random.default_rng(0).standard_normal(shape).astype(np.float32),
        "action_mask": np.arange(shape[1]) < lengths[:, None],
    }
    return TrainingBatch(sequences, arrays)


class PlainTrainer:
    """The same model and optimizer in plain torch, in its own process."""

    ROWS = 4
    """Maximum rows of a forward pass."""

    def __init__(self, model: ModelSection, sequences: list[TokenSequence], threads: int) -> None:
        """Load the model and pad the sequences."""
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._dtype = resolve_dtype(model.dtype)
        self._model = AutoModelForCausalLM.from_pretrained(resolve_path(model), dtype=torch.float32)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-6, fused=True)
        rows = sorted(sequences, key=lambda sequence: len(sequence.token_ids))
        self._batches = [rows[start : start + self.ROWS] for start in range(0, len(rows), self.ROWS)]

    def speed(self) -> float:
        """Return tokens per second of one optimizer step."""
        started = time.perf_counter()
        self._optimizer.zero_grad()
        for batch in self._batches:
            loss: Any = self._logprobs(batch).square().mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        tokens = sum(len(sequence.token_ids) for batch in self._batches for sequence in batch)
        return tokens / (time.perf_counter() - started)

    def _logprobs(self, batch: list[TokenSequence]) -> torch.Tensor:
        ids = [torch.from_numpy(sequence.token_ids.astype(np.int64)) for sequence in batch]
        pad = torch.nn.utils.rnn.pad_sequence
        padded, mask = pad(ids, batch_first=True), pad([torch.ones_like(one) for one in ids], batch_first=True)
        prompt = min(sequence.prompt_length for sequence in batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            kept = padded.shape[1] - prompt + 1
            logits = self._model(input_ids=padded, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
        chosen: torch.Tensor = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, padded[:, prompt:, None])
        return chosen
