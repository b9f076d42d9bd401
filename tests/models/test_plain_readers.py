"""Exports of every trainer are read by plain transformers and plain vLLM, and answer as `rayrlhf chat` does."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayrlhf.config.model import LoraSection, ModelSection
from rayrlhf.config.train import TrainSection
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.models.adapter_folder import adapter_parameters, merge_adapters
from tests.engines.training import join_alone
from tests.models.families import write_family
from tests.models.plain_readers import greedy_answers

LETTERS = range(100, 126)
"""Tokens of a to z."""


@pytest.fixture
def spelling(tmp_path):
    """A model that writes letters only."""
    folder = write_family("llama", tmp_path / "base", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    for token in set(range(264)) - set(LETTERS):
        tensors["lm_head.weight"][token] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return ModelSection(path=str(folder), dtype="float32")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_export_of_any_trainer_answers_alike_everywhere(spelling, tmp_path):
    join_alone()
    adapted = spelling.model_copy(update={"lora": LoraSection(rank=4)})
    for name, model, heads in (
        ("shared", spelling, {"lm", "value"}),  # PPO with a critic on the policy's trunk
        ("alone", spelling, {"lm"}),  # PPO with another critic or none, SFT, DPO, Pre-SFT
        ("merged", adapted, {"lm"}),  # PPO with adapters
        ("both", adapted, {"lm", "value"}),
    ):
        engine = TrainEngine(TrainEngineSpec(model, frozenset(heads), TrainSection(), 0.0, head_init="normal"))
        for parameter_name, parameter in adapter_parameters(engine._network.model):
            if ".lora_B." in parameter_name:
                torch.manual_seed(len(parameter_name))
                parameter.data.normal_(std=0.3)
        engine.export(tmp_path / name)
        assert [file.name for file in (tmp_path / name).glob("*.safetensors")] == ["model.safetensors"]
    merge_adapters(tmp_path / "merged-adapters", tmp_path / "exported")  # SFT and DPO with adapters
    names = ("shared", "alone", "merged", "both", "exported")
    found = dict(zip(names, greedy_answers([tmp_path / name for name in names], "Is it 3?"), strict=True))
    for name, texts in found.items():
        assert len(set(texts)) == 1, (name, texts)
    assert len(found["alone"][0]) == 8
    assert found["shared"] == found["alone"] != found["merged"]
    assert found["merged"] == found["both"] == found["exported"]
