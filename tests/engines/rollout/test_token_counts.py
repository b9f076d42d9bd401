"""vLLM multiplies few different numbers of tokens on a CPU, with the same results."""

from types import SimpleNamespace

import pytest
import torch

from rayrlhf.engines.rollout.token_counts import EXACT, bound_kernels, rounded, with_few_shapes


@pytest.mark.parametrize(
    ("tokens", "computed"),
    [(1, 1), (16, 16), (17, 18), (32, 32), (33, 36), (64, 64), (65, 72), (120, 120), (121, 128), (129, 144), (4001, 4096)],
)
def test_numbers_are_rounded_up_to_eight_an_octave(tokens, computed):
    assert rounded(tokens) == computed


def test_rounding_costs_an_eighth_at_most_and_leaves_eighty_numbers_of_four_thousand():
    assert all(tokens <= rounded(tokens) <= tokens * 9 / 8 for tokens in range(1, 4097))
    assert len({rounded(tokens) for tokens in range(1, 4097)}) == EXACT + 8 * 8


@pytest.mark.parametrize("shape", [(3, 8), (17, 8), (5, 7, 8), (0, 8)])
def test_padding_is_cut_off_again(shape):
    weight, bias, x = torch.randn(6, 8), torch.randn(6), torch.randn(shape)
    seen = []

    def multiply(handler, rows, offset):
        seen.append(rows.shape[:-1].numel())
        return torch.nn.functional.linear(rows, weight, offset)

    found = with_few_shapes(multiply)(SimpleNamespace(k=8, n=6), x, bias)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, bias))
    assert seen == [rounded(x.shape[:-1].numel())]


def test_the_layers_of_vllm_multiply_through_it_and_what_they_say_is_right():
    bound_kernels()
    bound_kernels()
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    assert utils.ops.onednn_mm is _custom_ops.onednn_mm
    assert _custom_ops.onednn_mm.__name__ == "padded"
    weight, bias = torch.randn(192, 64), torch.randn(192)
    handler = _custom_ops.create_onednn_mm(weight.t(), 32)
    for tokens in (1, 16, 17, 33, 100, 301):
        x = torch.randn(tokens, 64)
        found = _custom_ops.onednn_mm(handler, x, bias)
        torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
