"""Frozen weights keep the dtype of their checkpoint, and every number is that of float32 weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayrlhf.config.model import LoraSection, ModelSection
from rayrlhf.config.train import TrainSection
from rayrlhf.engines.objectives.policy import PolicyObjective, SharedObjective, ValueObjective
from rayrlhf.engines.scoring.frozen import FrozenEngine
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.models.held_weights import HeldEmbedding, HeldLinear
from rayrlhf.models.load import load_causal_model
from rayrlhf.models.tiny import byte_tokenizer
from tests.engines.training import random_batch, random_sequences, weights_of, write_llama
from tests.models.families import write_family

LOGPROBS = frozenset({"logprobs", "entropy"})

pytestmark = pytest.mark.usefixtures("alone")


def store(folder: Path, dtype: torch.dtype) -> Path:
    """Store a checkpoint's weights, rounded to bfloat16, in a dtype; its configuration says bfloat16."""
    for file in folder.glob("*.safetensors"):
        tensors = {name: tensor.bfloat16().to(dtype) for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = store(write_llama(tmp_path_factory.mktemp("model") / "half"), torch.bfloat16)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same weights in a file of float32."""
    folder = store(write_llama(tmp_path_factory.mktemp("model") / "full"), torch.float32)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def policy(path: str, dtype: str, stage: int = 0, **model: bool) -> TrainEngine:
    section = ModelSection(path=path, dtype=dtype, lora=LoraSection(rank=4, alpha=8), **model)
    train = TrainSection(zero_stage=stage)
    return TrainEngine(TrainEngineSpec(section, frozenset({"lm", "value"}), train, 1e-2, head_init="normal"))


def held_bytes(network: torch.nn.Module) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in network.parameters())


@pytest.mark.parametrize(("dtype", "stage"), [("float32", 0), ("float32", 2), ("float32", 3), ("bfloat16", 0), ("bfloat16", 3)])
def test_a_bfloat16_base_takes_the_steps_of_the_same_weights_in_float32(
    half: str, full: str, dtype: str, stage: int, tmp_path: Path
) -> None:
    found = []
    for path in (half, full):
        engine = policy(path, dtype, stage, gradient_checkpointing=stage == 2)
        for step in range(2):
            batch = random_batch(random_sequences(4, step), step)
            report = engine.update(batch, UpdatePlan([[[0, 1, 2, 3]]]), SharedObjective(PolicyObjective(), ValueObjective()))
        engine.export(tmp_path / "export")
        found.append((weights_of(engine), load_file(tmp_path / "export" / "model.safetensors"), report.grad_norms))
        parameters = list(engine._network.parameters())
        base = {one.dtype for one in parameters if not one.requires_grad and len(getattr(one, "ds_shape", one.shape)) > 1}
        assert base == {torch.bfloat16 if path == half else torch.float32}
        assert {one.dtype for one in parameters if one.requires_grad} == {torch.float32}
    (ours, files, norms), (wanted, wanted_files, wanted_norms) = found
    assert norms == wanted_norms
    assert all(torch.equal(ours[name], tensor) for name, tensor in wanted.items())
    assert all(torch.equal(files[name], tensor) and tensor.dtype == torch.bfloat16 for name, tensor in wanted_files.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reference_of_bfloat16_scores_as_one_of_float32_at_half_the_bytes(half: str, full: str, dtype: str) -> None:
    engines = [FrozenEngine(ModelSection(path=path, dtype=dtype), 64) for path in (half, full)]
    ours, wanted = (engine.score(random_sequences(5), LOGPROBS) for engine in engines)
    for one, other in zip(ours, wanted, strict=True):
        assert (one.logprobs == other.logprobs).all()
        assert (one.entropy == other.entropy).all()
    small, large = (held_bytes(engine._network) for engine in engines)
    assert small < 0.52 * held_bytes(load_causal_model(ModelSection(path=full)))
    assert small < large


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "mamba", "glm4_moe"])
def test_layers_that_read_their_own_dtype_keep_float32(family: str, tmp_path: Path) -> None:
    folder = store(write_family(family, tmp_path / family), torch.bfloat16)
    section = ModelSection(path=str(folder), attention="eager")
    tokens = torch.arange(3, 30)[None]
    models = [load_causal_model(section, frozen=frozen) for frozen in (False, True)]
    with torch.no_grad():
        wanted, found = (model(input_ids=tokens, use_cache=False).logits for model in models)
    assert torch.equal(found, wanted)
    kinds = {type(module) for module in models[1].modules()}
    assert (HeldLinear in kinds) == (family != "mamba")
    assert (HeldEmbedding in kinds) == (
        family in ("llama", "opt", "glm4_moe")
    )  # Gemma scales its embedding in the weight's dtype
