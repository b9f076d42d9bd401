"""A forward with forced experts equals a formula of its own, and with the model's own choice it changes nothing."""

from dataclasses import replace
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch

from rayrlhf.config.model import LoraSection, ModelSection
from rayrlhf.data.expert_ids import compact
from rayrlhf.data.records import TokenSequence
from rayrlhf.engines.train.collate import collate
from rayrlhf.errors import UserError
from rayrlhf.models.network import Network, build_network
from rayrlhf.models.routing_replay import ROUTERS, RoutingRecorder, check_routing_replay
from tests.engines.training import random_sequences
from tests.models.families import write_family

LAYERS, EXPERTS, CHOSEN = 3, 4, 2
CASES = [("qwen3_moe", {"norm_topk_prob": False}), ("qwen3_moe", {"norm_topk_prob": True}), ("mixtral", {})]
OUTPUTS: Any = frozenset({"logprobs", "routing"})


def network_of(path: Any, *, checkpointing: bool = False, lora: bool = False, plain: bool = False) -> Network:
    adapters = LoraSection(rank=4) if lora else None
    model = ModelSection(path=str(path), dtype="float32", gradient_checkpointing=checkpointing, lora=adapters)
    network = build_network(model, frozenset({"lm"}), "zero", seed=0)
    if not plain:
        network.accept_packed_rows(unshared="experts")
        network.replay_routing(str(path))
    for name, parameter in network.named_parameters():  # adapters begin as zeros
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    return network.train(checkpointing)


def with_experts(sequences: list[TokenSequence]) -> list[TokenSequence]:
    """Random experts at four of five tokens; the others have the model's own."""
    random, found = np.random.default_rng(3), []
    for sequence in sequences:
        draw = random.random((len(sequence.token_ids), LAYERS, EXPERTS)).argsort(-1)[..., :CHOSEN]
        ids = compact([(0, draw)], len(draw), EXPERTS)
        ids[::5] = 255
        found.append(replace(sequence, experts=ids))
    return found


def computed(network: Network, sequences: list[TokenSequence], *, packed: bool) -> tuple[Any, Any, dict[str, Any]]:
    """Log-probs, the share of other choices, and the gradient of the sum of squares."""
    network.zero_grad()
    batch = collate(sequences, max(len(one.token_ids) for one in sequences), torch.device("cpu"), packed=packed)
    output = network(batch.input_ids, batch.positions, OUTPUTS)
    output.logprobs.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return output.logprobs.detach(), output.routing, gradients


def by_formula(network: Network, sequences: list[TokenSequence], normalized: bool) -> tuple[Any, dict[str, Any]]:
    """Log-probs and gradient sample by sample, with routers that take the exponentials of the chosen logits."""
    routers = [module for module in network.model.modules() if type(module).__name__.endswith("TopKRouter")]
    found = []
    for sequence in sequences:
        for layer, router in enumerate(routers):
            router.forward = MethodType(_formula(sequence.experts[:, layer], normalized), router)
        tokens = torch.from_numpy(sequence.token_ids).long()
        logits = network.model(input_ids=tokens[None], use_cache=False).logits[0, sequence.prompt_length - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, tokens[sequence.prompt_length :, None])[:, 0])
    logprobs = torch.cat(found)
    logprobs.square().sum().backward()
    return logprobs.detach(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def _formula(ids: Any, normalized: bool) -> Any:
    def forward(self, hidden):
        logits = hidden.reshape(-1, hidden.shape[-1]) @ self.weight.T
        best = logits.topk(CHOSEN).indices
        forced = torch.from_numpy(ids.astype(np.int64))
        experts = torch.where(forced[:, :1] == 255, best, forced)
        exponentials = logits.exp()
        chosen = exponentials.gather(1, experts)
        return logits, chosen / (chosen if normalized else exponentials).sum(1, keepdim=True), experts

    return forward


def largest(first: dict[str, Any], second: dict[str, Any]) -> float:
    assert set(first) == set(second)
    scale = max(float(value.abs().max()) for value in second.values())
    return max(float((first[name] - second[name]).abs().max()) for name in first) / scale


@pytest.mark.parametrize(("family", "changes"), CASES)
@pytest.mark.parametrize("packed", [True, False])
def test_the_models_own_choice_replayed_changes_nothing(tmp_path, family, changes, packed):
    network, sequences = network_of(write_family(family, tmp_path, **changes)), random_sequences(3)
    plain, _, gradient = computed(network, sequences, packed=packed)
    recorder = RoutingRecorder(network.model, "")
    batch = collate(sequences, 1, torch.device("cpu"), packed=packed)
    network(batch.input_ids, batch.positions, OUTPUTS)
    own = recorder.ids(1).reshape(-1, LAYERS, CHOSEN)
    places = [compact([(0, own[rows])], len(rows), EXPERTS) for rows in batch.positions.places]
    known = [replace(one, experts=ids) for one, ids in zip(sequences, places, strict=True)]
    replayed, differs, again = computed(network, known, packed=packed)
    assert torch.equal(replayed, plain)
    assert largest(again, gradient) == 0.0
    assert not differs.any()


@pytest.mark.parametrize(("family", "changes"), CASES)
@pytest.mark.parametrize("layout", ["packed", "padded", "alone"])
def test_forced_experts_equal_the_formula(tmp_path, family, changes, layout):
    folder, sequences = write_family(family, tmp_path, **changes), with_experts(random_sequences(4))
    network = network_of(folder)
    assert network.check.layout == "packed"
    if layout == "alone":
        network.check = replace(network.check, layout="alone")
    logprobs, differs, gradient = computed(network, sequences, packed=layout != "padded")
    expected, exact = by_formula(network_of(folder, plain=True), sequences, changes.get("norm_topk_prob", True))
    assert (logprobs - expected).abs().max() < 1e-5
    assert largest(gradient, exact) < 1e-5
    unforced = computed(network, [replace(one, experts=None) for one in sequences], packed=layout != "padded")
    assert (logprobs - unforced[0]).abs().max() > 1e-2
    assert not unforced[1].any()
    plain = np.concatenate([one.experts[one.prompt_length - 1 : -1, 0, 0] for one in sequences]) == 255
    assert not differs[plain].any()
    assert differs.mean() > 0.5


@pytest.mark.parametrize("lora", [False, True])
def test_recomputed_activations_read_the_experts_of_their_own_forward(tmp_path, lora):
    folder, sequences = write_family("qwen3_moe", tmp_path), with_experts(random_sequences(3))
    network = network_of(folder, checkpointing=True, lora=lora)
    network.check = replace(network.check, layout="alone")  # several forwards before the backward
    _, _, gradient = computed(network, sequences, packed=False)
    _, exact = by_formula(network_of(folder, lora=lora, plain=True), sequences, normalized=False)
    assert any("lora" in name for name in exact) == lora
    assert largest(gradient, exact) < 1e-5


def test_a_network_without_replay_ignores_experts(tmp_path):
    network, sequences = network_of(write_family("mixtral", tmp_path)), random_sequences(2)
    network.replays_routing = False
    plain = computed(network, sequences, packed=False)[0]
    assert torch.equal(computed(network, with_experts(sequences), packed=False)[0], plain)


def test_families_without_known_routers_are_refused_by_their_configuration(tmp_path):
    for family in ("llama", "olmoe"):
        model = ModelSection(path=str(write_family(family, tmp_path / family)))
        with pytest.raises(UserError, match=f"routing_replay: not for a {family} model .*{', '.join(ROUTERS)}"):
            check_routing_replay(model)
