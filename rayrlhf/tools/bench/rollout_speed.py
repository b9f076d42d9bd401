"""`rayrlhf bench rollout`: sampled tokens per second of rollout actors, vLLM and transformers.

All sample the same prompts to the same lengths at temperature 1, with the threads of the whole machine, and are kept alive
between runs; one works at a time.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray

from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.section import GIB
from rayrlhf.data.records import Prompt
from rayrlhf.data.toy.word_problems import generate
from rayrlhf.engines.rollout.common import rollout_environment
from rayrlhf.engines.rollout.vllm_start import CPU_PREFILL_TOKENS
from rayrlhf.models.load import load_tokenizer, resolve_dtype
from rayrlhf.models.model_path import resolve_path
from rayrlhf.tools.bench.paired import Comparison, compare
from rayrlhf.tools.bench.work import bench_config, running_trainer

PROMPTS = 128
"""Number of prompts per run, all decoded at the same time."""


def bench_rollout(
    model: str, *, new_tokens: int, rounds: int, transformers: bool, progress: Callable[[str], None] = lambda _: None
) -> Comparison:
    """Compare plain vLLM, our actors and, on request, transformers.

    Args:
        new_tokens: maximum response length in tokens.
        transformers: measure `generate` too, which is slow.

    Returns:
        Sampled tokens per second, with plain vLLM as the baseline.
    """
    config = bench_config(
        [
            f"model.path={model}",
            f"rollout={{max_new_tokens: {new_tokens}, max_model_length: {new_tokens + 128}, memory_gib: 1.0}}",
        ]
    )
    rows = generate(0, PROMPTS, "train")
    ids = load_tokenizer(config.model)([row["question"] for row in rows])["input_ids"]
    prompts = [Prompt(number, "", np.array(one, dtype=np.int32)) for number, one in enumerate(ids)]
    with running_trainer(config) as trainer:
        threads = trainer.actor_groups.plan.workers["rollout"][0].threads
        environment = rollout_environment(config.rollout, threads=threads)
        plain = ray.remote(PlainEngines).options(num_cpus=0, runtime_env={"env_vars": environment}).remote(config)

        def ours() -> float:
            trainer.close_step()  # the same seeds in every round
            started = time.perf_counter()
            rollouts = trainer.generate(prompts)
            return sum(len(rollout.response_ids) for rollout in rollouts) / (time.perf_counter() - started)

        contenders: dict[str, Callable[[], float]] = {
            "plain vLLM": lambda: float(ray.get(plain.vllm.remote(ids))),
            "rayrlhf rollout actor": ours,
        }
        if transformers:
            contenders["transformers generate"] = lambda: float(ray.get(plain.transformers.remote(ids)))
        for warm in contenders.values():
            warm()
        title = f"{PROMPTS} responses of at most {new_tokens} tokens, {model}, {threads} threads"
        return compare(title, "tokens/s", contenders, rounds, progress)


class PlainEngines:
    """The engines of the comparison, in their own process."""

    def __init__(self, config: PPOConfig) -> None:
        """Start vLLM and load the model."""
        from transformers import AutoModelForCausalLM
        from vllm import LLM

        self._limit = config.rollout.max_new_tokens
        dtype = resolve_dtype(config.model.dtype)
        path = resolve_path(config.model)
        self._end = load_tokenizer(config.model).eos_token_id
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        self._engine = LLM(
            model=path,
            dtype=str(dtype).removeprefix("torch."),
            max_num_seqs=PROMPTS,
            max_model_len=config.rollout.max_model_length,
            kv_cache_memory_bytes=GIB,
            enforce_eager=True,
            enable_chunked_prefill=False,  # vLLM 0.32 cannot split the prompt of a request with a seed on a CPU
            max_num_batched_tokens=CPU_PREFILL_TOKENS,
            disable_log_stats=True,
        )

    def vllm(self, prompts: Sequence[Sequence[int]]) -> float:
        """Return tokens per second of `LLM.generate`, with seeds and log-probs as in rollouts."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input

        limits = [
            SamplingParams(temperature=1.0, seed=seed, max_tokens=self._limit, logprobs=0, detokenize=False)
            for seed in range(len(prompts))
        ]
        started = time.perf_counter()
        found = self._engine.generate([tokens_input(list(ids)) for ids in prompts], limits, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in found) / (time.perf_counter() - started)

    def transformers(self, prompts: Sequence[Sequence[int]]) -> float:
        """Return tokens per second of `generate`, up to the end of each response."""
        import torch

        longest = max(len(ids) for ids in prompts)
        pad: Any = [[self._end] * (longest - len(ids)) for ids in prompts]
        batch = torch.tensor([left + list(ids) for left, ids in zip(pad, prompts, strict=True)])
        mask = torch.tensor([[0] * len(left) + [1] * len(ids) for left, ids in zip(pad, prompts, strict=True)])
        started = time.perf_counter()
        with torch.no_grad():
            found = self._model.generate(
                input_ids=batch,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=self._limit,
                eos_token_id=self._end,
                pad_token_id=self._end,
            )[:, longest:]
        ended = (found == self._end).int().cumsum(1)
        tokens = int((ended == 0).sum()) + int((ended[:, -1] > 0).sum())
        return tokens / (time.perf_counter() - started)
