"""The load-balancing loss of a forward equals that of transformers, with its gradient; metrics equal a count by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from rayrlhf.config.model import ModelSection
from rayrlhf.engines.train.collate import collate
from rayrlhf.errors import UserError
from rayrlhf.models.network import Network, build_network
from rayrlhf.models.router_load import check_router_loss, load_balancing_loss, load_metrics
from tests.engines.training import random_sequences
from tests.models.families import write_family

SEQUENCES = random_sequences(4)
TOKENS = sum(len(one.token_ids) for one in SEQUENCES)
EXPERTS, CHOSEN = 4, 2


def network_of(path: Any, *, checkpointing: bool = False, plain: bool = False) -> Network:
    model = ModelSection(path=str(path), dtype="float32", gradient_checkpointing=checkpointing)
    network = build_network(model, frozenset({"lm"}), "zero", seed=0)
    if not plain:
        network.accept_packed_rows(unshared="experts")
    return network.train(checkpointing)


def gradients(network: Network, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    network.zero_grad()
    loss.backward()
    return {name: one.grad.clone() for name, one in network.named_parameters() if one.grad is not None and one.grad.any()}


def computed(network: Network, *, packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    batch = collate(SEQUENCES, max(len(one.token_ids) for one in SEQUENCES), torch.device("cpu"), packed=packed)
    output = network(batch.input_ids, batch.positions, frozenset({"logprobs", "load"}))
    assert output.logprobs.isfinite().all()
    return load_balancing_loss(output.load, TOKENS), output.load.detach()


def expected(network: Network) -> Any:
    """transformers' outputs for the padded batch."""
    batch = collate(SEQUENCES, max(len(one.token_ids) for one in SEQUENCES), torch.device("cpu"), packed=False)
    real = torch.arange(batch.input_ids.shape[1]) < torch.tensor([len(one.token_ids) for one in SEQUENCES])[:, None]
    return network.model(input_ids=batch.input_ids, attention_mask=real.long(), output_router_logits=True), real.flatten()


@pytest.mark.parametrize("layout", ["packed", "padded", "alone"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "qwen2_moe", "olmoe", "granitemoe"])
def test_the_loss_is_that_of_transformers(tmp_path, family, layout):
    folder = write_family(family, tmp_path)
    network = network_of(folder, checkpointing=family == "qwen3_moe")
    network.check = replace(network.check, layout="alone" if layout == "alone" else network.check.layout)
    loss, _ = computed(network, packed=layout != "padded")
    found = gradients(network, loss)
    plain = network_of(folder, plain=True)
    wanted = expected(plain)[0].aux_loss
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    exact = gradients(plain, wanted)
    assert set(found) == set(exact)
    assert any("gate" in name or "router" in name for name in found)
    scale = max(float(one.abs().max()) for one in exact.values())
    assert max(float((found[name] - one).abs().max()) for name, one in exact.items()) < 1e-5 * scale


def test_metrics_are_those_of_each_layer(tmp_path):
    network = network_of(write_family("mixtral", tmp_path), plain=True)
    with torch.no_grad():
        for layer, block in enumerate(network.trunk.layers):
            block.mlp.gate.weight[layer + 1 :] = 0.0  # unequal, and in the first layer experts that no token chooses
            block.mlp.gate.weight[: layer + 1] *= 100
        _, load = computed(network, packed=False)
        output, real = expected(network)
    metrics = load_metrics(load.double())
    assert len(metrics) == 3 * len(output.router_logits)
    for layer, logits in enumerate(output.router_logits):
        wanted = float(load_balancing_loss_func((logits,), EXPERTS, CHOSEN, real))
        assert metrics[f"moe/load_balance/layer_{layer}"] == pytest.approx(wanted, rel=1e-5)
        choices = logits[real].topk(CHOSEN).indices.flatten().tolist()
        counts = [choices.count(expert) for expert in range(EXPERTS)]
        mean = len(choices) / EXPERTS
        assert metrics[f"moe/max_violation/layer_{layer}"] == pytest.approx((max(counts) - mean) / mean)
        assert metrics[f"moe/expert_utilization/layer_{layer}"] == sum(count > 0 for count in counts) / EXPERTS


def test_a_coefficient_without_routers_is_refused_by_the_configuration(tmp_path):
    for family in ("llama", "deepseek_v3"):
        model = ModelSection(path=str(write_family(family, tmp_path / family)))
        check_router_loss(model, 0.0)
        with pytest.raises(UserError, match=f"router_aux_loss_coefficient 0.01: a {family} model .* has no routers"):
            check_router_loss(model, 0.01)
