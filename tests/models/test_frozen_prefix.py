"""The lower layers run once per sequence, and nobody can tell but by the clock."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from rayrlhf.models import frozen_prefix
from rayrlhf.models.frozen_prefix import FrozenPrefix

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 31}


def llama() -> LlamaModel:
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(**SMALL, num_key_value_heads=1)).eval()


def padded(lengths: list[int], width: int) -> list[np.ndarray]:
    return [row * width + np.arange(length) for row, length in enumerate(lengths)]


def count_calls(module: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_a_sequence_read_again_skips_the_lower_layers_with_any_neighbors() -> None:
    trunk = llama()
    lower, upper = count_calls(trunk.layers[0]), count_calls(trunk.layers[3])
    prefix = FrozenPrefix(trunk, 3)
    tokens = torch.randint(0, 31, (3, 9), generator=torch.Generator().manual_seed(0))
    lengths = [9, 5, 7]
    whole = trunk(input_ids=tokens).last_hidden_state
    first = prefix.run(tokens, padded(lengths, 9))
    assert (len(lower), len(upper)) == (2, 2)
    again = prefix.run(tokens[[2, 1]][:, :7], padded([7, 5], 7))
    assert (len(lower), len(upper)) == (2, 3)
    assert torch.equal(first, whole)
    torch.testing.assert_close(again[0], whole[2, :7], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again[1, :5], whole[1, :5], rtol=1e-5, atol=1e-6)
    assert len(trunk.layers) == 4
    prefix.clear()
    prefix.run(tokens, padded(lengths, 9))
    assert len(lower) == 3


def test_a_token_more_is_another_sequence() -> None:
    trunk = llama()
    prefix = FrozenPrefix(trunk, 2)
    tokens = torch.arange(8)[None]
    prefix.run(tokens[:, :7], padded([7], 7))
    lower = count_calls(trunk.layers[0])
    prefix.run(tokens, padded([8], 8))
    assert len(lower) == 1


def test_gradients_reach_the_upper_layers_from_a_remembered_start() -> None:
    trunk = llama()
    for parameter in trunk.parameters():
        parameter.requires_grad_(False)
    weight = trunk.layers[3].mlp.up_proj.weight.requires_grad_()
    tokens = torch.arange(8)[None]
    prefix = FrozenPrefix(trunk, 3)
    gradients = [torch.autograd.grad(prefix.run(tokens, padded([8], 8)).square().sum(), weight)[0] for _ in range(2)]
    assert torch.equal(*gradients)
    assert float(gradients[0].abs().sum()) > 0


def test_beyond_its_memory_budget_it_computes_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_prefix, "BUDGET_BYTES", 16 * 4 * 8)
    trunk = llama()
    prefix = FrozenPrefix(trunk, 2)
    lower = count_calls(trunk.layers[0])
    for tokens in (torch.arange(8)[None], torch.arange(1, 9)[None]):
        results = [prefix.run(tokens, padded([8], 8)) for _ in range(2)]
        assert torch.equal(*results)
    assert len(lower) == 1 + 2


def test_only_architectures_that_can_start_midway_are_supported(tmp_path: Path) -> None:
    assert FrozenPrefix.supports(llama(), 2)
    assert not FrozenPrefix.supports(llama(), 0)
    assert FrozenPrefix.supports(Qwen2Model(Qwen2Config(**SMALL, num_key_value_heads=1)).eval(), 1)
    mixed = Qwen2Config(**SMALL, num_key_value_heads=1, use_sliding_window=True, sliding_window=2, max_window_layers=2)
    assert not FrozenPrefix.supports(Qwen2Model(mixed).eval(), 1)
    assert not FrozenPrefix.supports(GPT2Model(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=31)).eval(), 1)
