"""What the tests of both samplers share: tiny engines, requests, and what a plain forward pass says of a rollout."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from rayrlhf.config.model import ModelSection
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.data.records import Rollout, RolloutRequest, SampleKey
from rayrlhf.engines.rollout.base import RolloutEngine
from rayrlhf.engines.rollout.common import RolloutSpec
from rayrlhf.engines.rollout.factory import build_rollout_engine
from rayrlhf.models.builtin import resolve_model

torch.set_num_threads(1)  # Tiny models gain nothing from threads, and lose much when others use the same cores.

CONTEXT = 96
TINY = f"builtin:tiny?layers=2&hidden=128&context={CONTEXT}&tie="
PROMPTS = [
    [3 + byte for byte in text.encode()]
    for text in ("\nHello there", "one two", "How many apples are left in the basket?", "Z")
]


def start(
    backend: str, *, tie: bool = True, dtype: str = "float32", logprobs: bool = True, continues: bool = False, **rollout: Any
) -> RolloutEngine:
    """An engine of 8 requests at a time, so that larger batches have to wait."""
    settings = {"backend": backend, "max_concurrent": 8, "memory_gib": 0.0625} | rollout
    model = ModelSection.model_validate({"path": TINY + str(tie).lower(), "dtype": dtype})
    section = RolloutSection.model_validate(settings)
    return build_rollout_engine(RolloutSpec(model, section, seed=0, logprobs=logprobs, continues=continues))


def load_network(*, tie: bool = True) -> Any:
    """The model the engines start from, as transformers alone loads it."""
    return AutoModelForCausalLM.from_pretrained(resolve_model(TINY + str(tie).lower()), dtype=torch.float32).eval()


def make_requests(samples: int, *, step: int = 0) -> list[RolloutRequest]:
    """`samples` requests for each prompt, the prompts taking turns."""
    return [
        RolloutRequest(SampleKey(step, prompt, sample), np.array(PROMPTS[prompt], dtype=np.int32), 1000 * sample + prompt)
        for sample in range(samples)
        for prompt in range(len(PROMPTS))
    ]


def sample(
    engine: RolloutEngine,
    requests: Iterable[RolloutRequest],
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 24,
    minimum: int = 3,
) -> dict[SampleKey, Rollout]:
    """Submit, and poll until nothing is left."""
    engine.submit(list(requests), temperature=temperature, max_new_tokens=max_new_tokens)
    rollouts: list[Rollout] = []
    while engine.unfinished:
        rollouts += engine.poll(minimum)
    return {rollout.key: rollout for rollout in rollouts}


@torch.no_grad()
def gap(network: Any, rollouts: Iterable[Rollout], *, temperature: float = 1.0, average: bool = False) -> float:
    """|sampler log-prob - log-prob by one full forward pass| over all response tokens in nats: the largest, or the mean."""
    gaps = []
    for rollout in rollouts:
        tokens = torch.from_numpy(rollout.sequence().token_ids).long()
        logits = network(input_ids=tokens[None]).logits[0, len(rollout.prompt_ids) - 1 : -1].float()
        logprobs = torch.log_softmax(logits / temperature, -1).gather(-1, tokens[len(rollout.prompt_ids) :, None])[:, 0]
        gaps.append((logprobs - torch.from_numpy(rollout.logprobs)).abs())
    every = torch.cat(gaps)
    return float(every.mean() if average else every.max())
