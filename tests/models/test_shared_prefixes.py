"""Tokens that samples begin with in common are computed once, with the outputs and gradients of each sample apart."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.config.model import LoraSection, ModelSection
from rayrlhf.data.prefix_tree import in_prefix_order
from rayrlhf.data.records import TokenSequence
from rayrlhf.engines.scoring.frozen import score_sequences
from rayrlhf.engines.train.collate import collate
from rayrlhf.models.network import build_network
from tests.models.families import VOCABULARY, write_family

CPU = torch.device("cpu")
OUTPUTS = frozenset({"logprobs", "entropy", "values"})
HEADS = frozenset({"lm", "value"})


def sequence(prompt, *tokens):
    return TokenSequence(np.concatenate(tokens).astype(np.int32), prompt)


def branching():
    """A group, a branch inside its response, a repetition, a prefix of another sample, one-token tails, and strangers."""
    generator = np.random.default_rng(0)

    def draw(count):
        return generator.integers(3, VOCABULARY, count)

    prompt, response = draw(40), draw(20)
    return [
        sequence(40, prompt, response), sequence(40, prompt, response[:7], draw(9)), sequence(40, prompt, response),
        sequence(40, prompt, response[:7]), sequence(40, prompt, draw(1)), sequence(40, prompt, draw(1)),
        sequence(30, prompt[:25], draw(30)), sequence(5, draw(12)), sequence(45, draw(50)),
    ]  # fmt: skip


SAMPLES = branching()


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = str(write_family(name, tmp_path_factory.mktemp(name) / "model"))
        return made[name]

    return folder


def loaded(path, **options):
    network = build_network(ModelSection(path=path, dtype="float32", **options), HEADS, "normal", 0)
    network.train(options.get("gradient_checkpointing", False))
    network.accept_packed_rows()
    return network


def outputs_and_gradients(network, samples, *, shared):
    network.zero_grad()
    batch = collate(samples, 60, CPU, shared=shared)
    output = network(batch.input_ids, batch.positions, OUTPUTS)
    weights = torch.linspace(0.5, 1.5, len(output.logprobs))
    loss = (output.logprobs * weights).mean() + 0.1 * output.entropy.mean() + output.values.square().mean()
    loss.backward()
    flat = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return batch, loss.item(), output, torch.cat(flat)


def assert_same(network, samples=SAMPLES):
    plain, loss, output, gradient = outputs_and_gradients(network, samples, shared=False)
    shared, other_loss, other, other_gradient = outputs_and_gradients(network, samples, shared=True)
    assert shared.input_ids.numel() < plain.input_ids.numel()
    assert abs(loss - other_loss) <= 1e-6 * abs(loss)
    assert (gradient - other_gradient).norm() <= 1e-6 * gradient.norm()
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(other, name), getattr(output, name), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma", "gpt2"])
def test_losses_and_gradients_are_those_of_samples_computed_apart(family, name):
    network = loaded(family(name))
    assert "share prefixes" in network.check.line()
    assert_same(network)


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"lora": LoraSection(rank=4)}], ids=str)
def test_recomputed_activations_and_adapters_take_the_same_gradient(family, options):
    assert_same(loaded(family("llama"), **options))


@pytest.mark.parametrize("name", ["mistral", "gemma3", "qwen3_5", "lfm2", "falcon_h1", "phi3_longrope"])
def test_models_with_windows_other_layers_or_longrope_share_nothing(family, name):
    network = loaded(family(name))
    assert not network.check.shares_prefixes
    assert "samples may be packed and share" not in network.check.line()
    batch = collate(SAMPLES, 60, CPU, shared=True)
    with pytest.raises(ValueError, match="cannot share prefixes"):
        network(batch.input_ids, batch.positions, OUTPUTS)


def test_a_segment_that_reads_a_stranger_is_found_on_load(family, monkeypatch):
    from rayrlhf.models import segment_kernels

    monkeypatch.setattr(segment_kernels, "joined", lambda parts, chain: torch.cat(parts[: chain[-1] + 1], dim=2)[:, :, -sum(
        parts[number].shape[2] for number in chain):])  # fmt: skip
    network = loaded(family("llama"))
    assert (network.check.layout, network.check.shares_prefixes) == ("packed", False)


# Other tokens at each position: where all are equal, gradients of the scores cancel, and only rounding is left to compare.
TREES = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=9), min_size=2, max_size=9).map(
    lambda rows: [np.array([3 + 3 * place + choice for place, choice in enumerate(row)]) for row in rows]
)


@settings(max_examples=10, deadline=None)
@given(TREES, st.data())
def test_random_trees_take_the_gradient_of_samples_computed_apart(family, trees, data):
    samples = [sequence(data.draw(st.integers(1, len(tokens) - 1)), tokens) for tokens in trees]
    network = family_network(family)
    _, loss, _, gradient = outputs_and_gradients(network, samples, shared=False)
    _, other_loss, _, other_gradient = outputs_and_gradients(network, samples, shared=True)
    # Rounding does not average out over so few tokens.
    assert abs(loss - other_loss) <= 5e-6 * max(1.0, abs(loss))
    assert (gradient - other_gradient).norm() <= 5e-6 * gradient.norm()


def family_network(family, kept={}):  # noqa: B006
    return kept.setdefault("llama", kept.get("llama") or loaded(family("llama")))


@pytest.mark.parametrize("budget", [100, 4096])
def test_scores_are_in_input_order_and_equal_in_any_batch(family, budget):
    network = family_network(family)
    assert in_prefix_order([sample.token_ids for sample in SAMPLES]).pays
    scores = [
        score_sequences(network, SAMPLES, OUTPUTS, temperature=0.7, token_budget=budget, device=CPU, shares_prefixes=shares)
        for shares in (False, True)
    ]
    for plain, shared in zip(*scores, strict=True):
        for name in OUTPUTS:
            np.testing.assert_allclose(getattr(shared, name), getattr(plain, name), rtol=1e-5, atol=5e-6)


def test_bfloat16_is_as_close_to_float32_as_without_sharing(family):
    network = family_network(family)
    found = []
    for dtype, shared in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            found.append(outputs_and_gradients(network, SAMPLES, shared=shared)[3])
    exact, plain, shared = found
    assert (shared - exact).norm() <= 1.2 * (plain - exact).norm()
