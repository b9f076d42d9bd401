"""An output layer in float32 brings the log-probs of trainer and rollout engine closer in bfloat16."""

import shutil

import numpy as np
import pytest
import torch

from rayrlhf.config.model import ModelSection
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.engines.rollout.common import RolloutSpec
from rayrlhf.engines.rollout.factory import build_rollout_engine
from rayrlhf.engines.scoring.frozen import autocast, score_sequences
from rayrlhf.models.builtin import resolve_model
from rayrlhf.models.network import build_network
from tests.engines.rollout_cases import CONTEXT, TINY, load_network, make_requests, sample


def mean_gap(backend: str, path: str, head_dtype: str, *, context: int = CONTEXT) -> float:
    """Mean difference of the log-probs of trainer and engine in nats, over the sampled tokens."""
    model = ModelSection.model_validate({"path": path, "dtype": "bfloat16", "head_dtype": head_dtype})
    network = build_network(model, frozenset({"lm"}), "zero", 0)
    rollout = RolloutSection.model_validate(
        {"backend": backend, "max_concurrent": 8, "memory_gib": 0.0625, "max_model_length": context}
    )
    engine = build_rollout_engine(RolloutSpec(model, rollout, seed=0))
    try:
        rollouts = list(sample(engine, make_requests(4), max_new_tokens=context - 50).values())
    finally:
        engine.close()
    device = torch.device("cpu")
    with torch.no_grad(), autocast(device, torch.bfloat16):
        scores = score_sequences(
            network,
            [one.sequence() for one in rollouts],
            frozenset({"logprobs"}),
            temperature=1.0,
            token_budget=512,
            device=device,
        )
    gaps = [np.abs(np.asarray(one.logprobs) - rollout.logprobs) for one, rollout in zip(scores, rollouts, strict=True)]
    return float(np.concatenate(gaps).mean())


@pytest.fixture(scope="module")
def large_logits(tmp_path_factory):
    """A model with logits far from 0, as those of trained ones: all rows of its output layer share a part."""
    folder = tmp_path_factory.mktemp("models") / "large"
    shutil.copytree(resolve_model(TINY + "false"), folder)
    network = load_network(tie=False)
    head = network.lm_head.weight
    with torch.no_grad():
        head += 2 * torch.randn(head.shape[1], generator=torch.Generator().manual_seed(0))
    network.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("backend", ["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
def test_the_gap_of_a_tiny_model_halves(large_logits, backend):
    narrow, wide = (mean_gap(backend, large_logits, head) for head in ("model", "float32"))
    print(f"{backend}: {narrow:.2e} -> {wide:.2e} nats")
    assert wide < narrow / 2


@pytest.mark.nightly
def test_the_gap_of_smollm2_falls_by_a_quarter_at_least():
    path = "builtin:smollm2-135m-instruct"
    narrow, wide = (mean_gap("vllm", path, head, context=256) for head in ("model", "float32"))
    print(f"SmolLM2: {narrow:.2e} -> {wide:.2e} nats")
    assert wide < 0.75 * narrow
