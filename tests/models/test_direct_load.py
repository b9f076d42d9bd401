"""Weights go from their files into place: the bits of `from_pretrained`, and never two copies."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, conversion_mapping
from transformers.core_model_loading import Concatenate, WeightConverter

from rayrlhf.config.model import ModelSection
from rayrlhf.errors import UserError
from rayrlhf.models import load
from rayrlhf.models.load import load_causal_model, load_trunk
from tests.models.bytes_held import BytesHeld
from tests.models.families import write_family

WHOLE = "loaded whole by transformers"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model of 3.1 MB in six files, two of its tensors far larger than the rest."""
    config = LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, max_position_embeddings=64, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model", max_shard_size="600KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 4
    return tmp_path / "model"


def same(ours: torch.nn.Module, wanted: torch.nn.Module) -> None:
    """Equal parameters, buffers, ties, configuration and generation settings."""
    for kind in ("named_parameters", "named_buffers"):
        one, other = (dict(getattr(network, kind)(remove_duplicate=False)) for network in (ours, wanted))
        assert one.keys() == other.keys()
        for name, tensor in other.items():
            assert one[name].dtype == tensor.dtype
            assert torch.equal(one[name], tensor), name
    assert len(list(ours.parameters())) == len(list(wanted.parameters()))
    assert ours.config.to_dict() == wanted.config.to_dict()
    assert ours.training == wanted.training
    if wanted.can_generate():
        assert ours.generation_config.to_dict() == wanted.generation_config.to_dict()


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma2", "opt", "phi3_longrope", "mamba", "qwen3_moe", "mixtral", "olmoe", "deepseek_v3"]
)
def test_a_family_is_read_in_place_as_transformers_reads_it(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    section = ModelSection(path=str(write_family(family, tmp_path / family)), attention="eager")
    with caplog.at_level(logging.INFO):
        pairs = [(load_causal_model(section), AutoModelForCausalLM), (load_trunk(section), AutoModel)]
    assert WHOLE not in caplog.text
    for ours, auto_class in pairs:
        same(ours, load._from_pretrained(auto_class, section, section.path))


def test_a_persistent_buffer_is_read_in_place(tmp_path: Path) -> None:
    folder = write_family("llama", tmp_path / "llama")
    section = ModelSection(path=str(folder))
    file = folder / "model.safetensors"
    weights = load_file(file)
    LlamaForCausalLM.score_bias = None

    class WithBias(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.register_buffer("score_correction", torch.zeros(5))

    del LlamaForCausalLM.score_bias
    save_file(weights | {"score_correction": torch.arange(5.0)}, file, {"format": "pt"})

    class Auto:
        @staticmethod
        def from_config(config: LlamaConfig, **settings: object) -> WithBias:
            return WithBias._from_config(config, **settings)

    network = load._load(Auto, section, False, None)
    assert torch.equal(network.score_correction, torch.arange(5.0))


@pytest.mark.parametrize("case", ["pickled", "shape", "twice"])
def test_what_is_no_plain_copy_goes_through_transformers(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_family("qwen3", tmp_path / "model")
    file = folder / "model.safetensors"
    weights = load_file(file)
    if case == "pickled":
        torch.save(weights, folder / "pytorch_model.bin")
        file.unlink()
    elif case == "twice":  # tied, but stored under both names
        save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    elif case == "shape":
        save_file(weights | {"model.norm.weight": torch.ones(3)}, file, {"format": "pt"})
    section = ModelSection(path=str(folder))
    with caplog.at_level(logging.INFO):
        if case == "shape":
            with pytest.raises((UserError, RuntimeError)):
                load_causal_model(section)
        else:
            same(load_causal_model(section), load._from_pretrained(AutoModelForCausalLM, section, str(folder)))
    assert WHOLE in caplog.text


def test_weights_that_are_computed_from_others_go_through_transformers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_family("qwen3", tmp_path / "model")
    joined = WeightConverter("norm.*.weight", "norm.weight", operations=[Concatenate(dim=0)])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda *_, **__: [joined])
    file = folder / "model.safetensors"
    weights = load_file(file)
    norm = weights.pop("model.norm.weight")
    save_file(weights | {f"model.norm.{half}.weight": part for half, part in enumerate(norm.chunk(2))}, file, {"format": "pt"})
    monkeypatch.setattr(load, "_from_pretrained", lambda *_: "whole")
    section = ModelSection(path=str(folder))
    with caplog.at_level(logging.INFO):
        assert load_causal_model(section) == "whole"
    assert WHOLE in caplog.text


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    folder = write_family("llama", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weight is not in the files, the first is model\.norm\.weight"):
        load_causal_model(ModelSection(path=str(folder)))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_load_holds_the_module_and_at_most_two_tensors(sharded: Path, stored: torch.dtype, frozen: bool) -> None:
    for file in sharded.glob("*.safetensors"):
        save_file({name: tensor.to(stored) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps(config | {"dtype": str(stored).removeprefix("torch.")}))
    with BytesHeld() as held:
        network = load_causal_model(ModelSection(path=str(sharded)), frozen=frozen)
    sizes = [parameter.numel() * parameter.element_size() for parameter in network.parameters()]
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in network.buffers())
    two = 2 * max(sizes)
    assert sum(sizes) > 2 * two  # a second copy of the model would not hide
    assert sum(sizes) <= held.peak <= sum(sizes) + buffers + two
    assert held.now <= sum(sizes) + 2 * buffers


def test_experts_are_stacked_one_tensor_at_a_time(tmp_path: Path) -> None:
    folder = write_family("mixtral", tmp_path / "model")
    with BytesHeld() as held:
        network = load_causal_model(ModelSection(path=str(folder)))
    sizes = [parameter.nbytes for parameter in network.parameters()]
    buffers = sum(buffer.nbytes for buffer in network.buffers())
    assert sum(sizes) <= held.peak <= sum(sizes) + buffers + max(sizes)


def test_the_count_sees_a_second_copy(sharded: Path) -> None:
    with BytesHeld() as held:
        network = load_causal_model(ModelSection(path=str(sharded)))
        state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert held.peak >= 2 * size
