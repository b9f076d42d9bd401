"""Model calls of one PPO step alone: vLLM generation, torch forward and backward passes.

There are no masks, advantages, statistics, weight sync or messages, but losses of the same shape: a log-prob for every response
token, one value per token, one optimizer step of policy and critic per epoch. This is the time of a PPO step without any
overhead.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rayrlhf.library_types import PreTrainedModel
from rayrlhf.tools.bench.operations import Lengths
from rayrlhf.tools.bench.work import PPOWork

ROWS = 16
"""Rows of a forward pass: the fastest of 8, 16, 32 and 64 on the development machine."""


class PlainPPO:
    """All models of the job, in this process."""

    def __init__(self, work: PPOWork) -> None:
        """Start vLLM and load the models."""
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
        from vllm import LLM

        self._work = work
        self._prompts = work.token_ids()[: work.prompts]
        self._rollout_engine = LLM(
            model=work.policy,
            dtype=work.precision,
            max_num_seqs=work.prompts,
            max_model_len=256,
            kv_cache_memory_bytes=2**28,
            enforce_eager=True,
            disable_log_stats=True,
        )
        self._policy, self._reference = (
            AutoModelForCausalLM.from_pretrained(work.policy, dtype=torch.float32) for _ in range(2)
        )
        self._critic, self._reward = (
            AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
            for path in (work.policy, work.reward)
        )
        self._optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) for model in self._trained]
        self.parts: dict[str, float] = {}
        """Seconds of each part of the last step."""
        self.lengths = Lengths([], [])
        """Token counts of that step's prompts and responses."""

    def seconds(self) -> float:
        """Run two steps; return the seconds of the second."""
        self._step()
        self._step()
        return sum(self.parts.values())

    @property
    def _trained(self) -> list[Any]:
        return [self._policy, self._critic]

    def _step(self) -> None:
        self.parts = {}
        with self._clock("generate"):
            responses = self._generate()
        self.lengths = Lengths([len(ids) for ids in self._prompts], [len(ids) for ids in responses])
        batches = list(self._batches(responses))
        with torch.no_grad():
            for name, model in (("reference", self._reference), ("policy", self._policy)):
                with self._clock(name):
                    for ids, mask, prompt in batches:
                        self._logprobs(model, ids, mask, prompt)
            for name, model in (("reward", self._reward), ("critic", self._critic)):
                with self._clock(name):
                    for ids, mask, _ in batches:
                        self._values(model, ids, mask)
        for _ in range(self._work.epochs):
            with self._clock("update_policy"):
                self._update(0, [lambda b=b: self._logprobs(self._policy, *b) for b in batches])
            with self._clock("update_critic"):
                self._update(1, [lambda b=b: self._values(self._critic, *b[:2]) for b in batches])

    def _generate(self) -> list[list[int]]:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input

        limits = SamplingParams(temperature=1.0, max_tokens=self._work.new_tokens, logprobs=0, detokenize=False)
        found = self._rollout_engine.generate([tokens_input(ids) for ids in self._prompts], limits, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found]

    def _batches(self, responses: list[list[int]]) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield right-padded token ids and masks, sorted by length, and the shortest prompt length."""
        rows = sorted(zip(self._prompts, responses, strict=True), key=lambda row: len(row[0]) + len(row[1]))
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            ids = [torch.tensor(prompt + response) for prompt, response in part]
            mask = [torch.ones_like(one) for one in ids]
            pad = torch.nn.utils.rnn.pad_sequence
            yield pad(ids, batch_first=True), pad(mask, batch_first=True), min(len(prompt) for prompt, _ in part)

    def _logprobs(self, model: PreTrainedModel, ids: Tensor, mask: Tensor, prompt: int) -> Tensor:
        with self._autocast():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=ids.shape[1] - prompt + 1).logits
        chosen: Tensor = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, ids[:, prompt:, None])
        return chosen

    def _values(self, model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
        with self._autocast():
            hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            values: Tensor = model.score(hidden)
        return values.float()

    def _update(self, which: int, forwards: list[Any]) -> None:
        optimizer = self._optimizers[which]
        optimizer.zero_grad()
        for forward in forwards:
            forward().square().mean().backward()
        optimizer.step()

    def _autocast(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=self._work.precision == "bfloat16")

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - started
