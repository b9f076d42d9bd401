"""New weights of mixture-of-experts models arrive in vLLM, whose CPU kernel packs the experts."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rayrlhf.config.model import ModelSection
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.engines.rollout.common import RolloutSpec
from rayrlhf.engines.rollout.factory import build_rollout_engine
from rayrlhf.models.lora import checkpoint_tensors
from rayrlhf.models.tiny import byte_tokenizer
from rayrlhf.weight_sync.buckets import bucketed
from tests.engines.rollout_cases import CONTEXT, gap, make_requests, sample

WIDTH = 48  # of an expert; the kernel pads it to 64
FEW = {"num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": WIDTH, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": FEW | {"moe_intermediate_size": WIDTH, "shared_expert_intermediate_size": 64},
    "qwen3_moe": FEW | {"moe_intermediate_size": WIDTH, "norm_topk_prob": True},
    "olmoe": FEW | {"intermediate_size": WIDTH},
}


def build(family: str) -> tuple[Any, Any]:
    tokenizer = byte_tokenizer()
    config = AutoConfig.for_model(
        family,
        **{"vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": CONTEXT},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": False},
        **{"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
        **FAMILIES[family],
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), tokenizer


@torch.no_grad()
def perturb(network: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.mark.parametrize(
    "family", [name if name == "qwen3_moe" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_after_every_load_the_sampler_says_what_the_new_experts_say(tmp_path, family):
    network, tokenizer = build(family)
    perturb(network, 0)
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    section = RolloutSection(max_concurrent=8, memory_gib=0.0625)
    engine = build_rollout_engine(RolloutSpec(ModelSection(path=str(tmp_path), dtype="float32"), section, seed=0))
    try:
        for version in (1, 2):
            perturb(network, version)
            assert gap(network, sample(engine, make_requests(1), max_new_tokens=8).values()) > 0.05
            engine.begin_weights(version)
            for bucket in bucketed(((tensor.name, tensor.value()) for tensor in checkpoint_tensors(network)), 20_000):
                engine.receive_weights(bucket)
            engine.finish_weights()
            assert gap(network, sample(engine, make_requests(1), max_new_tokens=8).values()) < 1e-5
    finally:
        engine.close()
