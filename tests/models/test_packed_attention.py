"""A sample in a packed row is read as if it were alone."""

import pytest
import torch

from rayrlhf.config.model import ModelSection
from rayrlhf.engines.train.collate import collate
from rayrlhf.models.network import build_network
from tests.engines.training import random_sequences, write_llama

CPU = torch.device("cpu")


def logprobs(network, sequences, *, packed):
    width = max(sequence.response_length for sequence in sequences) + 1
    batch = collate(sequences, width, CPU, packed=packed)
    return network(batch.input_ids, batch.positions, frozenset({"logprobs"})).logprobs


@pytest.fixture
def section(tmp_path):
    return ModelSection(path=str(write_llama(tmp_path / "model")), dtype="float32")


def sliding(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, sliding_window=5, initializer_range=0.2,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path / "sliding")
    return ModelSection(path=str(tmp_path / "sliding"), dtype="float32")


@pytest.mark.parametrize("own_attention", [True, False])
def test_packed_and_padded_rows_give_the_same_logprobs(section, own_attention):
    network = build_network(section, frozenset({"lm"}), "zero", 0)
    sequences = random_sequences(7)
    expected = logprobs(network, sequences, packed=False)
    if own_attention:
        network.accept_packed_rows()
        assert network.by_segments
    torch.testing.assert_close(logprobs(network, sequences, packed=True), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logprobs(network, sequences, packed=False), expected, rtol=0, atol=1e-5)


def test_a_window_on_the_attention_is_kept(tmp_path):
    network = build_network(sliding(tmp_path), frozenset({"lm"}), "zero", 0)
    sequences = random_sequences(7)
    expected = logprobs(network, sequences, packed=False)
    network.accept_packed_rows()
    assert not network.by_segments
    torch.testing.assert_close(logprobs(network, sequences, packed=True), expected, rtol=0, atol=1e-5)


def test_a_neighbour_in_the_row_changes_nothing(section):
    network = build_network(section, frozenset({"lm"}), "zero", 0)
    network.accept_packed_rows()
    one, two, other = random_sequences(3)
    first = logprobs(network, [one, two], packed=True)[: one.response_length]
    assert torch.equal(logprobs(network, [one, other], packed=True)[: one.response_length], first)
    last = logprobs(network, [two, one], packed=True)[two.response_length :]
    torch.testing.assert_close(last, first, rtol=0, atol=1e-5)


def test_noise_on_the_embeddings_has_the_strength_of_neftune_and_spares_scoring(section):
    network = build_network(section, frozenset({"lm"}), "zero", 0)
    network.add_noise(5.0)
    network.accept_packed_rows()
    sequences = random_sequences(6)
    embedded = []
    network.trunk.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[2]))
    noisy = []
    network.trunk.layers[0].register_forward_pre_hook(lambda _, inputs: noisy.append(inputs[0]))
    for packed in (False, True):
        batch = collate(sequences, 20, CPU, packed=packed)
        network(batch.input_ids, batch.positions, frozenset({"logprobs"}))
        noise = (noisy[-1] - embedded[-1]).reshape(-1, 32)
        starts = [0]
        for length in batch.positions.lengths:
            starts.append(starts[-1] + (length if packed else batch.input_ids.shape[1]))
        for start, length in zip(starts, batch.positions.lengths, strict=False):
            bound = 5.0 / (length * 32) ** 0.5
            part = noise[start : start + length].abs()
            assert 0.8 * bound < part.max() <= bound * 1.00001
    with torch.no_grad():
        network(batch.input_ids, batch.positions, frozenset({"logprobs"}))
    assert torch.equal(noisy[-1], embedded[-1])
