"""Counted operations against torch's own counter, and the table of phases."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from rayrlhf.tools.bench.operations import Lengths, forward_operations, phase_operations, phase_table
from rayrlhf.tools.launch.model_shape import shape_of


@pytest.fixture(scope="module")
def model():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=101, num_key_value_heads=2, **sizes, attn_implementation="eager"))


def test_a_forward_takes_as_many_operations_as_torch_counts(model):
    ids = torch.randint(0, 101, (5, 24))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    lengths = Lengths([0] * 5, [24] * 5)
    shape = shape_of(model)
    attention = 2 * 3 * 64 * 5 * 24 * 24  # torch computes what the mask hides too
    assert forward_operations(shape, lengths, outputs=True) + attention == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_the_output_layer_is_applied_to_responses_only(model):
    shape = shape_of(model)
    lengths = Lengths([10, 20], [3, 4])
    with_outputs = forward_operations(shape, lengths, outputs=True)
    assert with_outputs - forward_operations(shape, lengths, outputs=False) == 2 * 64 * 101 * 7


def test_an_epoch_is_a_forward_and_a_backward_of_twice_its_size(model):
    found = phase_operations(shape_of(model), Lengths([4], [6]), epochs=3)
    assert found["update_policy"] == 9 * found["generate"]
    assert found["update_critic"] == 9 * found["critic"]


def test_the_table_shows_seconds_and_shares_of_what_was_counted():
    table = phase_table({"a": {"x": 2.0, "y": 0.5}, "b": {"x": 1.0}}, {"a": {"x": 1e9}, "b": {}}, 1e9)
    assert table.splitlines() == [
        "| seconds (share of 1 GFLOP/s) | a | b |",
        "|---|---|---|",
        "| x | 2.00 (50%) | 1.00 |",
        "| y | 0.50 |  |",
    ]
