"""Adapters: where they sit, that they start as nothing, and that merging equals peft's own."""

import pytest
import torch
from torch import Tensor

from rayrlhf.config.model import LoraSection, ModelSection
from rayrlhf.errors import UserError
from rayrlhf.models.adapter_folder import adapter_parameters, merge_adapters, save_adapters
from rayrlhf.models.load import load_causal_model, load_tokenizer
from rayrlhf.models.lora import adapters_disabled, add_lora, checkpoint_tensors, has_lora
from rayrlhf.models.network import build_network
from rayrlhf.models.start_check import check_configuration
from rayrlhf.tuning.merge import exported_model
from tests.models.families import write_family

TINY = ModelSection(path="builtin:tiny?layers=3&hidden=64")
TOKENS = torch.arange(3, 40)[None]


def with_lora(section: LoraSection, *, randomise: bool = True) -> torch.nn.Module:
    network = load_causal_model(TINY)
    network.requires_grad_(False)
    add_lora(network, section, seed=0)
    if randomise:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in network.named_parameters():
            if ".lora_B." in name:
                parameter.data.normal_(std=0.1, generator=generator)
    return network


def logits(network: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return network(input_ids=TOKENS).logits


def test_adapters_change_nothing_at_the_start_and_switch_off_exactly() -> None:
    plain = logits(load_causal_model(TINY))
    assert torch.equal(logits(with_lora(LoraSection(rank=2), randomise=False)), plain)
    network = with_lora(LoraSection(rank=2))
    assert not torch.equal(logits(network), plain)
    trainable = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    with adapters_disabled(network):
        assert torch.equal(logits(network), plain)
    assert not torch.equal(logits(network), plain)
    assert [name for name, parameter in network.named_parameters() if parameter.requires_grad] == trainable


def test_only_adapters_learn() -> None:
    network = with_lora(LoraSection(rank=2))
    assert all(".lora_" in name for name, parameter in network.named_parameters() if parameter.requires_grad)
    assert has_lora(network)
    assert not has_lora(load_causal_model(TINY))


def test_the_last_layers_alone_are_adapted_and_the_backward_pass_stops_there() -> None:
    network = with_lora(LoraSection(rank=2, last_layers=1))
    adapted = {name.split(".layers.")[1][0] for name, _ in network.named_parameters() if ".lora_" in name}
    assert adapted == {"2"}
    reached = []
    for layer in network.model.layers:
        layer.register_forward_hook(lambda *call: reached.append(bool(call[2].requires_grad)))
    network(input_ids=TOKENS)
    assert reached == [False, False, True]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "mlp.up_proj"]])
def test_a_model_without_output_layer_gets_the_adapters_of_one_with(targets) -> None:
    section = LoraSection(rank=2, last_layers=2, target_modules=targets)
    trunk = load_causal_model(TINY).model
    add_lora(trunk, section, seed=0)
    whole = with_lora(section, randomise=False)
    names = {name: parameter for name, parameter in whole.named_parameters() if "lora_" in name}
    assert {name.split(".")[2] for name in names} == {"1", "2"}
    found = {f"model.{name}": parameter for name, parameter in trunk.named_parameters() if "lora_" in name}
    assert found.keys() == names.keys()
    assert all(torch.equal(found[name], names[name]) for name in names)


def test_merged_weights_equal_pefts_merge_and_leave_the_network_alone() -> None:
    section = LoraSection(rank=3, alpha=7.0)
    network = with_lora(section)
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    merged = {tensor.name: tensor.value() for tensor in checkpoint_tensors(network)}
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name])
    reference = with_lora(section)
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in [module for module in reference.modules() if isinstance(module, BaseTunerLayer)]:
        layer.merge()
    expected = {
        name.replace(".base_layer", ""): parameter for name, parameter in reference.named_parameters() if ".lora_" not in name
    }
    assert set(merged) == set(expected) == {name for name, _ in load_causal_model(TINY).named_parameters()}
    for name, tensor in merged.items():
        assert torch.equal(tensor, expected[name])


def test_a_model_of_merged_weights_computes_what_the_adapters_compute() -> None:
    network = with_lora(LoraSection(rank=3))
    plain = load_causal_model(TINY)
    plain.load_state_dict({tensor.name: tensor.value() for tensor in checkpoint_tensors(network)}, strict=False)
    torch.testing.assert_close(logits(plain), logits(network), rtol=1e-4, atol=1e-5)


def test_unknown_targets_and_too_many_layers_are_the_users_mistakes() -> None:
    with pytest.raises(UserError, match="target_modules"):
        with_lora(LoraSection(target_modules=["nothing_like_it"]))
    with pytest.raises(UserError, match="no linear layer 'nothing_like_it'"):
        with_lora(LoraSection(target_modules=["q_proj", "nothing_like_it"]))
    with pytest.raises(UserError, match="last_layers 9: the model has 3 layers"):
        with_lora(LoraSection(last_layers=9))


@pytest.mark.parametrize("adapters", [False, True])
def test_persistent_buffers_are_part_of_the_checkpoint_under_their_own_dtype(adapters: bool) -> None:
    network = with_lora(LoraSection(rank=2)) if adapters else load_causal_model(TINY)
    network.model.layers[0].mlp.register_buffer("score_correction", torch.linspace(-1, 1, 4, dtype=torch.float64))
    network.model.layers[0].mlp.register_buffer("scratch", torch.zeros(4), persistent=False)
    tensors = {tensor.name: tensor for tensor in checkpoint_tensors(network)}
    assert "model.layers.0.mlp.scratch" not in tensors
    correction = tensors["model.layers.0.mlp.score_correction"]
    assert correction.is_buffer
    assert torch.equal(correction.value(), torch.linspace(-1, 1, 4, dtype=torch.float64))
    assert [name for name, tensor in tensors.items() if tensor.is_buffer] == [correction.name]


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("tie", ["true", "false"])
def test_adapters_on_the_embedding_or_the_output_layer_are_refused_by_name_before_weights_load(target, tie) -> None:
    lora = LoraSection(rank=4, target_modules=[target, "q_proj"])
    section = ModelSection(path=f"builtin:tiny?layers=3&hidden=64&tie={tie}", lora=lora)
    for attempt in (lambda: check_configuration(section), lambda: build_network(section, frozenset({"lm"}), "zero", 0)):
        with pytest.raises(UserError, match=f"target_modules: '{target}' is the embedding or the output layer of Llama"):
            attempt()


@pytest.mark.parametrize(("name", "target"), [("gpt_neox", "embed_out"), ("gpt2", "wte"), ("opt", "embed_positions")])
def test_adapters_on_embeddings_and_output_layers_are_refused_under_any_name(name, target, tmp_path) -> None:
    lora = LoraSection(rank=4, target_modules=[target])
    section = ModelSection(path=str(write_family(name, tmp_path)), lora=lora)
    with pytest.raises(UserError, match=f"target_modules: ('{target}' is the embedding|no linear layer '{target}')"):
        check_configuration(section)


def test_a_merge_takes_the_base_at_its_revision_with_its_code_and_its_dtype(tmp_path, monkeypatch) -> None:
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    network = load_causal_model(TINY)
    network.bfloat16().save_pretrained(base)
    load_tokenizer(TINY).save_pretrained(base)
    section = ModelSection(path=str(base), revision="v1", dtype="float32", lora=LoraSection(rank=2))
    adapted = load_causal_model(section)
    add_lora(adapted, section.lora, seed=0)
    state = {name: torch.full_like(parameter, 0.05) for name, parameter in adapter_parameters(adapted)}
    save_adapters(adapted, section, state, load_tokenizer(section), tmp_path / "run" / "export")
    (tmp_path / "run" / "config.yaml").write_text("model: {path: base, trust_remote_code: true}")
    asked = []

    def spy(model):
        asked.append(model)
        return load_causal_model(model)

    monkeypatch.setattr("rayrlhf.models.adapter_folder.load_causal_model", spy)
    merged = exported_model(tmp_path / "run", merge=True)
    assert [(model.path, model.revision, model.trust_remote_code) for model in asked] == [(str(base), "v1", True)]
    found = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    assert found.dtype == torch.bfloat16
    for name, parameter in adapter_parameters(adapted):
        parameter.data.copy_(state[name])
    wanted = {tensor.name: tensor.value().bfloat16() for tensor in checkpoint_tensors(adapted)}
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter.data, wanted[name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(("name", "attention"), [("gpt_neo", "eager"), ("gemma3n", "sdpa")])
def test_adapters_of_a_relative_path_are_merged_from_anywhere_with_any_attention_and_layers(
    name, attention, tmp_path, monkeypatch
) -> None:
    write_family(name, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    section = ModelSection(path="base", dtype="float32", attention=attention, lora=LoraSection(rank=2))
    adapted = load_causal_model(section)
    add_lora(adapted, section.lora, seed=0)
    state = {name: torch.full_like(parameter, 0.05) for name, parameter in adapter_parameters(adapted)}
    save_adapters(adapted, section, state, load_tokenizer(section), tmp_path / "adapters")
    monkeypatch.chdir("/")
    merge_adapters(tmp_path / "adapters", tmp_path / "merged")
    for name, parameter in adapter_parameters(adapted):
        parameter.data.copy_(state[name])
    merged = load_causal_model(ModelSection(path=str(tmp_path / "merged"), attention=attention))
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-3, atol=1e-4)
