"""Rollouts bring the experts that the engine chose for each token that it computed."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rayrlhf.config.model import ModelSection
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.data.expert_ids import widen
from rayrlhf.engines.rollout.common import RolloutSpec
from rayrlhf.engines.rollout.factory import build_rollout_engine
from rayrlhf.models.routing_replay import RoutingRecorder
from tests.engines.rollout_cases import make_requests, sample
from tests.models.families import write_family


@torch.no_grad()
def own_choice(network: Any, recorder: RoutingRecorder, tokens: Any) -> Any:
    network(input_ids=torch.from_numpy(tokens).long()[None])
    return np.sort(recorder.ids(1)[0], -1)


@pytest.mark.parametrize(
    ("backend", "family"),
    [
        ("transformers", "qwen3_moe"),
        pytest.param("vllm", "qwen3_moe", marks=pytest.mark.slow),
        pytest.param("vllm", "mixtral", marks=pytest.mark.slow),
    ],
)
def test_experts_of_all_computed_tokens_are_those_of_a_plain_forward(tmp_path, backend, family):
    folder = write_family(family, tmp_path)
    section = RolloutSection(backend=backend, max_concurrent=6, memory_gib=0.0625, routing_replay="rollout")
    engine = build_rollout_engine(RolloutSpec(ModelSection(path=str(folder), dtype="float32"), section, seed=0))
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    recorder = RoutingRecorder(network, str(folder))
    try:
        rollouts = sample(engine, make_requests(3), max_new_tokens=12).values()
        cached = 0
        for rollout in rollouts:
            tokens, ids = rollout.sequence().token_ids, widen(rollout.sequence().experts)
            assert ids.shape == (len(tokens), 3, 2)
            known = ids[:, 0, 0] >= 0
            assert not known[-1]  # nothing was computed from the last token
            assert (~known).sum() == rollout.cached_tokens + 1
            assert np.array_equal(np.sort(ids, -1)[known], own_choice(network, recorder, tokens)[known])
            cached += rollout.cached_tokens
        assert (cached > 0) == (backend == "vllm")
    finally:
        engine.close()
