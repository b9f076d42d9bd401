"""Attention of segments is that of torch's kernels on each sample, values and gradients, and keeps each token once."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rayrlhf.models.packed_attention import Segments
from rayrlhf.models.segment_kernels import SegmentAttention, kernel_dtype

LENGTHS, PARENTS = [50, 30, 1, 300, 60], [-1, 0, 1, 0, -1]
"""Two samples and three branches of the first one."""


def tensors(generator, count, length, key_heads=4, dtype=torch.float32, rows=1):
    shapes = [(rows, heads, length, 16) for heads in (4, key_heads, key_heads)][:count]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def attention(inputs, lengths, parents=None):
    return SegmentAttention.apply(*inputs, Segments.of(lengths, parents, torch.device("cpu")), 0.3)


def of_samples(inputs, lengths, parents):
    """Attention by the definition, in float64."""
    query, key, value = (one.double() for one in inputs)
    segments = Segments.of(lengths, parents, torch.device("cpu"))
    places = torch.split(torch.arange(sum(lengths)), lengths)
    outputs = []
    for number, chain in enumerate(segments.chains):
        read = torch.cat([places[member] for member in chain])
        mask = torch.ones(lengths[number], len(read), dtype=torch.bool).tril(len(read) - lengths[number])
        parts = query[:, :, places[number]], key[:, :, read], value[:, :, read]
        outputs.append(scaled_dot_product_attention(*parts, attn_mask=mask, scale=0.3, enable_gqa=True))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def with_gradients(output, inputs, weights):
    return [output, *torch.autograd.grad((output * weights).sum(), inputs)]


def differences(dtype, key_heads):
    """Relative L2 distances of output and gradients from the definition."""
    generator = torch.Generator().manual_seed(key_heads)
    inputs = tensors(generator, 3, sum(LENGTHS), key_heads, dtype)
    weights = torch.randn(1, sum(LENGTHS), 4, 16, generator=generator).to(dtype)
    found = with_gradients(attention(inputs, LENGTHS, PARENTS), inputs, weights)
    expected = with_gradients(of_samples(inputs, LENGTHS, PARENTS), inputs, weights)
    return [((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in zip(found, expected, strict=True)]


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_segments_attend_to_the_segments_that_they_continue(key_heads):
    assert max(differences(torch.float32, key_heads)) < 1e-6


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_bfloat16_is_within_its_rounding(key_heads):
    assert max(differences(torch.bfloat16, key_heads)) < 0.01


@pytest.mark.parametrize("length", [1, 7, 128, 129, 300, 700])
def test_bfloat16_is_as_close_to_the_truth_as_the_fused_kernel(length):
    generator = torch.Generator().manual_seed(length)
    inputs = tensors(generator, 3, length, dtype=torch.bfloat16, rows=2)
    weights = torch.randn(2, length, 4, 16, generator=generator).bfloat16()
    fused = scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3).transpose(1, 2)
    truth = scaled_dot_product_attention(*(one.double() for one in inputs), is_causal=True, scale=0.3).transpose(1, 2)
    results = [with_gradients(output, inputs, weights) for output in (attention(inputs, [length]), fused, truth)]
    for ours, theirs, exact in zip(*results, strict=True):
        assert (ours - exact).norm() <= 2.5 * (theirs - exact).norm() + 0.05  # blocks round their scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_pass_keeps_queries_keys_values_and_outputs_once(dtype):
    inputs = tensors(torch.Generator().manual_seed(0), 3, sum(LENGTHS), 2, dtype)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.setdefault(one.data_ptr(), one), lambda one: one):
        attention(inputs, LENGTHS, PARENTS)
    sums = 4 * 4 * sum(LENGTHS) if dtype == torch.float32 else 0
    assert sum(one.nbytes for one in kept.values()) == sum(one.nbytes for one in (*inputs, inputs[0])) + sums


def test_autocast_decides_the_dtype_and_other_inputs_are_left_to_torch():
    query, key, value = tensors(torch.Generator().manual_seed(0), 3, 8)
    assert kernel_dtype(query, key, value) == torch.float32
    assert kernel_dtype(query, key, value[..., :8]) is None
    assert kernel_dtype(query, key, value.bfloat16()) is None
    assert kernel_dtype(query.double(), key.double(), value.double()) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert kernel_dtype(query, key, value.bfloat16()) == torch.bfloat16
