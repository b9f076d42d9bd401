"""LoRA adapters in vLLM, unmerged: what it samples is what the trainer's network with the same adapters says."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rayrlhf.config.model import ModelSection
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.engines.rollout import vllm_lora
from rayrlhf.engines.rollout.common import RolloutSpec
from rayrlhf.engines.rollout.vllm import VLLMRolloutEngine
from rayrlhf.engines.rollout.vllm_lora import lora_settings
from rayrlhf.errors import UserError
from rayrlhf.models.adapter_folder import adapter_parameters
from rayrlhf.models.lora import add_lora
from rayrlhf.weight_sync.buckets import bucketed
from tests.engines.rollout_cases import TINY, gap, load_network, make_requests, sample

LORA = {"rank": 4, "alpha": 8, "last_layers": 1}


def spec(**lora: Any) -> RolloutSpec:
    model = ModelSection.model_validate({"path": f"{TINY}true", "dtype": "float32", "lora": LORA | lora})
    section = RolloutSection.model_validate({"max_concurrent": 8, "memory_gib": 0.0625})
    return RolloutSpec(model, section, seed=0, continues=True, adapters=True)


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLMRolloutEngine]:
    engine = VLLMRolloutEngine(spec())
    yield engine
    engine.close()


@torch.no_grad()
def adapted(seed: int) -> Any:
    network = load_network()
    add_lora(network, spec().model.lora, seed)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in adapter_parameters(network):
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network


def load(engine: VLLMRolloutEngine, version: int, network: Any) -> None:
    engine.begin_weights(version)
    for bucket in bucketed(((name, tensor.detach()) for name, tensor in adapter_parameters(network)), 5_000):
        engine.receive_weights(bucket)
        for _, tensor in bucket:
            assert tensor.numel()
    engine.finish_weights()


def test_before_the_first_sync_it_is_the_base_model(engine):
    assert gap(load_network(), sample(engine, make_requests(2)).values()) < 1e-5


def test_after_every_sync_log_probs_are_those_of_the_trainer(engine):
    for version in (1, 2):
        network = adapted(version)
        assert gap(network, sample(engine, make_requests(2)).values()) > 0.05
        load(engine, version, network)
        rollouts = sample(engine, make_requests(2)).values()
        assert gap(network, rollouts) < 1e-5
        assert {int(one) for rollout in rollouts for one in rollout.versions} == {version}


def test_unfinished_requests_go_on_with_the_new_adapter(engine):
    load(engine, 3, adapted(3))
    engine.submit(make_requests(1), temperature=1.0, max_new_tokens=24)
    engine.poll(1, 0.0)
    engine._engine.step()
    load(engine, 4, adapted(4))
    rollouts = engine.poll(4)
    assert {int(one) for rollout in rollouts for one in rollout.versions} == {3, 4}


def test_an_incomplete_adapter_is_refused_until_the_rest_has_come(engine):
    network = adapted(5)
    tensors = [(name, tensor.detach()) for name, tensor in adapter_parameters(network)]
    engine.begin_weights(5)
    engine.receive_weights(tensors[1:])
    with pytest.raises(ValueError, match=r"1 adapter tensors missing or unknown: .*lora_A"):
        engine.finish_weights()
    engine.receive_weights(tensors[:1])
    engine.finish_weights()
    assert gap(network, sample(engine, make_requests(1)).values()) < 1e-5


def test_a_load_leaves_no_folder_in_shared_memory(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_lora, "MEMORY_FOLDER", tmp_path)
    used = []
    add_lora = engine._engine.add_lora
    monkeypatch.setattr(engine._engine, "add_lora", lambda request: [used.append(request.lora_path), add_lora(request)][1])
    load(engine, 6, network := adapted(6))
    assert [path.startswith(str(tmp_path)) for path in used] == [True]
    assert list(tmp_path.iterdir()) == []
    assert gap(network, sample(engine, make_requests(1)).values()) < 1e-5


def test_a_rank_beyond_vllms_is_refused_in_one_line():
    with pytest.raises(
        UserError, match=r"model\.lora\.rank 513: vLLM serves adapters up to rank 512; set rollout\.lora=merged"
    ):
        lora_settings(spec(rank=513).model)
