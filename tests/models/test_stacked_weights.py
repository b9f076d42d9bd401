"""Experts of checkpoints: their names, shapes and rows, and the export under transformers' own names."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from transformers import AutoModelForCausalLM

from rayrlhf.models.load import save_model_folder
from rayrlhf.models.stacked_weights import copy_stacked, only_stacks, sources_by_parameter, stacked_shape
from rayrlhf.models.tensor_files import TensorKind, TensorStream
from tests.models.families import write_family


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "phimoe", "llama"])
def test_an_export_that_comes_one_tensor_at_a_time_has_the_files_of_transformers(family: str, tmp_path: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(write_family(family, tmp_path / "model"))
    assert only_stacks(network)
    state = {name: parameter.detach() for name, parameter in network.named_parameters()}
    state |= {name: buffer for name, buffer in network.state_dict().items() if name not in state and name != "lm_head.weight"}
    network.save_pretrained(tmp_path / "theirs", state_dict=dict(state))
    kinds = {name: TensorKind(tensor.shape, tensor.dtype) for name, tensor in state.items()}
    save_model_folder(tmp_path / "ours", network, TensorStream(kinds, iter(state.items())), None)
    ours, theirs = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_experts_are_ordered_by_number_and_parts_by_the_familys_mapping(tmp_path: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(write_family("mixtral", tmp_path / "model"))
    names = [
        f"model.layers.1.block_sparse_moe.experts.{number}.{part}.weight" for number in (10, 9, 2) for part in ("w3", "w1")
    ]
    (found,) = sources_by_parameter(network, names).items()
    expert = "model.layers.1.block_sparse_moe.experts"
    assert found == (
        "model.layers.1.mlp.experts.gate_up_proj",
        tuple(tuple(f"{expert}.{number}.{part}.weight" for number in (2, 9, 10)) for part in ("w1", "w3")),
    )


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([[[3, 5]] * 4, [[2, 5]] * 4], [4, 5, 5]),
        ([[[3, 5]] * 4], [4, 3, 5]),
        ([[[3, 5]] * 4, [[3, 5]] * 3], []),
        ([[[3, 5]] * 3 + [[4, 5]]], []),
        ([[[3, 5]] * 4, [[3, 6]] * 4], []),
        ([[[]] * 4], []),
    ],
)
def test_tensors_that_do_not_fit_together_have_no_shape(shapes: list[list[list[int]]], expected: list[int]) -> None:
    assert stacked_shape(shapes) == expected


def test_only_the_rows_of_a_rank_are_read(tmp_path: Path) -> None:
    tensors = {f"{part}.{number}": torch.randn(2, 3) for part in "ab" for number in range(4)}
    save_file(tensors, tmp_path / "file.safetensors")
    value = torch.zeros(4, 4, 3)
    with safe_open(tmp_path / "file.safetensors", framework="pt") as file:
        parts = [[file.get_slice(f"{part}.{number}") if number in (1, 2) else None for number in range(4)] for part in "ab"]
        copy_stacked(value, slice(1, 3), parts)
    wanted = torch.stack([torch.cat([tensors[f"a.{number}"], tensors[f"b.{number}"]]) for number in (1, 2)])
    assert torch.equal(value[1:3], wanted)
    assert not value[[0, 3]].any()
