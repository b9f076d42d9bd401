"""What of a LoRA update arrives at a rollout engine in bfloat16: all of an adapter's own tensors, little of merged weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayrlhf.config.model import LoraSection, ModelSection
from rayrlhf.config.train import TrainSection
from rayrlhf.engines.objectives.policy import PolicyObjective
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.models.adapter_folder import adapter_parameters, merge_adapters
from rayrlhf.models.rounding import UpdateShare, share_line
from rayrlhf.models.tiny import byte_tokenizer
from rayrlhf.ppo.chat import chat_with, find_model
from tests.engines.training import random_batch, random_sequences, write_llama

LORA = LoraSection(rank=4, alpha=8)

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose weights lie on the bfloat16 grid, as those of published models do."""
    folder = write_llama(tmp_path_factory.mktemp("model") / "llama")
    weights = load_file(folder / "model.safetensors")
    rounded = {name: tensor.bfloat16().float() for name, tensor in weights.items()}
    save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def trained(path: str, rate: float, steps: int, *, lora: LoraSection | None = LORA, stage: int = 0) -> TrainEngine:
    model = ModelSection(path=path, dtype="float32", lora=lora)
    engine = TrainEngine(TrainEngineSpec(model, frozenset({"lm"}), TrainSection(zero_stage=stage), rate))
    for step in range(steps):
        engine.update(random_batch(random_sequences(4, step), step), UpdatePlan([[[0, 1, 2, 3]]]), PolicyObjective())
    return engine


def products(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """B A of every adapter."""
    suffix = "lora_A.weight"
    return {
        name: tensors[name.replace("lora_A", "lora_B")].float() @ tensors[name].float()
        for name in tensors
        if name.endswith(suffix)
    }


def drain(engine: TrainEngine, dtype: str, *, adapters: bool) -> dict[str, torch.Tensor]:
    return dict(pair for bucket in engine.weight_buckets(4000, dtype=dtype, adapters=adapters) for pair in bucket)


@pytest.mark.parametrize("rate", [1e-5, 1e-4, 5e-4])
def test_an_adapter_in_bfloat16_brings_the_whole_update(llama: str, rate: float) -> None:
    engine = trained(llama, rate, 16)
    meant, sent = (products(drain(engine, dtype, adapters=True)) for dtype in ("float32", "bfloat16"))
    share = UpdateShare()
    for name, update in meant.items():
        share.add(torch.zeros_like(update), update, sent[name])
    assert share.value == pytest.approx(1.0, abs=0.01)  # 0.95 is asked for


def test_merged_weights_lose_a_small_update_in_bfloat16_and_engine_and_export_say_so(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = trained(llama, 1e-5, 4)
    start = load_file(Path(llama) / "model.safetensors")
    merged, sent = (drain(engine, dtype, adapters=False) for dtype in ("float32", "bfloat16"))
    adapted = [name for name in merged if "proj" in name]
    dot = sum(((sent[name].float() - start[name]) * (merged[name] - start[name])).sum() for name in adapted)
    expected = float(dot / sum((merged[name] - start[name]).square().sum() for name in adapted))
    assert engine.update_arrived == pytest.approx(expected, abs=1e-4)
    assert expected < 0.5
    engine.export_adapters(tmp_path / "adapter")
    assert merge_adapters(tmp_path / "adapter", tmp_path / "merged") == 1.0  # in the float32 of the base
    monkeypatch.setattr("rayrlhf.models.adapter_folder.checkpoint_dtype", lambda _: torch.bfloat16)
    assert merge_adapters(tmp_path / "adapter", tmp_path / "merged") == pytest.approx(expected, abs=1e-4)
    line = f"merged in bfloat16, which keeps {expected:.0%} of the adapters' update"
    assert share_line(tmp_path / "merged") == line
    monkeypatch.setattr("rayrlhf.engines.train.engine.checkpoint_dtype", lambda _: torch.bfloat16)
    engine.export(tmp_path / "run" / "export")
    assert share_line(tmp_path / "run" / "export") == line
    kept = load_file(tmp_path / "run" / "export-adapters" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in drain(engine, "float32", adapters=True).items())
    assert find_model(tmp_path / "run") == tmp_path / "run" / "export"
    monkeypatch.setattr("builtins.input", lambda _: "")
    chat_with(tmp_path / "run", None, max_new_tokens=1, temperature=0.0)
    assert line in capsys.readouterr().err
    drain(engine, "float32", adapters=False)
    assert engine.update_arrived is None


def test_full_fine_tuning_loses_nothing_because_trainer_and_rollout_engine_round_the_same_masters(llama: str) -> None:
    start = load_file(Path(llama) / "model.safetensors")
    engine = trained(llama, 1e-4, 4, lora=None)
    sent, share = drain(engine, "bfloat16", adapters=False), UpdateShare()
    for name, parameter in engine._network.model.named_parameters():
        with torch.autocast("cpu", torch.bfloat16):
            # What the trainer multiplies by, seen through a product with the identity.
            used = torch.eye(len(parameter)) @ parameter.detach() if parameter.ndim == 2 else parameter.detach().bfloat16()
        share.add(start[name], used.float(), sent[name])
    assert share.value == 1.0
    assert engine.update_arrived is None  # this engine computes in float32
    bfloat16 = TrainEngine(TrainEngineSpec(ModelSection(path=llama, dtype="bfloat16"), frozenset({"lm"}), TrainSection(), 1e-4))
    drain(bfloat16, "bfloat16", adapters=False)
    assert bfloat16.update_arrived == 1.0


@pytest.mark.parametrize("stage", [0, 3])
def test_an_adapter_travels_whole_under_the_names_of_its_file(llama: str, tmp_path: Path, stage: int) -> None:
    engine = trained(llama, 1e-2, 1, stage=stage)
    sent = drain(engine, "float32", adapters=True)
    engine.export_adapters(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert set(sent) == set(saved) == {name for name, _ in adapter_parameters(engine._network.model)}
    assert all(torch.equal(sent[name], saved[name]) for name in sent)
    assert any(tensor.any() for name, tensor in sent.items() if "lora_B" in name)
