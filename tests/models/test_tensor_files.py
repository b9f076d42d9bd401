"""Tensors that come one at a time make the files that safetensors and transformers read."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rayrlhf.config.model import ModelSection
from rayrlhf.models.load import load_causal_model, save_model_folder
from rayrlhf.models.tensor_files import TensorKind, TensorStream, write_stream
from tests.engines.training import write_llama
from tests.models.families import write_family


def stream(tensors: dict[str, torch.Tensor]) -> TensorStream:
    return TensorStream({name: TensorKind(one.shape, one.dtype) for name, one in tensors.items()}, iter(tensors.items()))


MIXED = {
    "odd": torch.arange(3, dtype=torch.int8),
    "half": torch.randn(5, 3).bfloat16(),
    "scalar": torch.tensor(2.5),
    "wide": torch.randn(2, 2, 2, dtype=torch.float64),
    "turned": torch.randn(4, 6).t(),
    "none": torch.empty(0, 3),
    "flags": torch.tensor([True, False]),
}


@pytest.mark.parametrize(("limit", "files"), [(10**9, 1), (60, 4)])
def test_any_dtypes_and_shapes_come_back(limit: int, files: int, tmp_path: Path) -> None:
    write_stream(tmp_path, stream(MIXED), file_bytes=limit)
    found = {}
    paths = sorted(tmp_path.glob("*.safetensors"))
    for path in paths:
        found |= load_file(path)
    assert found.keys() == MIXED.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in MIXED.items())
    assert len(paths) == files
    if files > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == MIXED.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in MIXED.values())


@pytest.mark.parametrize("fault", ["other", "short", "long", "shape"])
def test_a_stream_that_is_not_what_it_said_leaves_no_folder(fault: str, tmp_path: Path) -> None:
    network = load_causal_model(ModelSection(path=str(write_llama(tmp_path / "model"))))
    state = {name: tensor.detach() for name, tensor in network.named_parameters()}
    kinds = stream(state).kinds

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        pairs = list(state.items())
        if fault == "short":
            pairs.pop()
        elif fault == "long":
            pairs.append(("more", torch.ones(1)))
        elif fault == "other":
            pairs[0], pairs[1] = pairs[1], pairs[0]
        else:
            pairs[0] = pairs[0][0], pairs[0][1][:3]
        yield from pairs

    with pytest.raises(ValueError, match=r"expected|more tensors"):
        save_model_folder(tmp_path / "out", network, TensorStream(kinds, tensors()), None)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_a_streamed_folder_is_the_one_that_transformers_writes(family: str, tmp_path: Path) -> None:
    section = ModelSection(path=str(write_family(family, tmp_path / "model")))
    network = load_causal_model(section)
    state = {name: tensor.detach() for name, tensor in network.named_parameters()}
    for name, kind in (("whole", state), ("streamed", stream(state))):
        save_model_folder(tmp_path / name, network, kind, None)
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("whole", "streamed")]
    assert names[0] == names[1]
    for name in names[0]:
        one, other = tmp_path / "whole" / name, tmp_path / "streamed" / name
        if name.endswith("safetensors"):
            assert {key: tensor.tolist() for key, tensor in load_file(one).items()} == {
                key: tensor.tolist() for key, tensor in load_file(other).items()
            }
        else:
            assert one.read_text() == other.read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")
    assert all(torch.equal(loaded.get_parameter(name), tensor) for name, tensor in state.items())
