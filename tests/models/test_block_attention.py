"""Attention by blocks is the fused kernel's attention, values and gradients."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rayrlhf.models.packed_attention import block_attention


@pytest.mark.parametrize("length", [1, 7, 128, 129, 300, 700])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_blocks_give_the_values_and_gradients_of_the_fused_kernel(length, key_heads):
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, heads, length, 16) for heads in (4, key_heads, key_heads)]
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    weights = torch.randn(2, length, 4, 16, generator=generator)
    found = block_attention(*inputs, 0.3)
    expected = scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    gradients = [torch.autograd.grad((output * weights).sum(), inputs) for output in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_as_close_to_the_truth_as_the_fused_kernel():
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, 4, 300, 64, generator=generator) for _ in range(3)]
    rounded = [tensor.bfloat16() for tensor in exact]
    truth = scaled_dot_product_attention(*(tensor.float() for tensor in rounded), is_causal=True)
    ours = (block_attention(*rounded, 64**-0.5).transpose(1, 2).float() - truth).abs().mean()
    fused = (scaled_dot_product_attention(*rounded, is_causal=True).float() - truth).abs().mean()
    assert ours <= 2.0 * fused  # one unit in the last place of the probabilities
