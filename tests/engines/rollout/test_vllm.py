"""What only concerns vLLM: how it starts, what it refuses, and that it goes away."""

import gc
import importlib.util
import sys
import weakref

import numpy as np
import pytest

from rayrlhf.config.model import ModelSection
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.data.records import RolloutRequest, SampleKey
from rayrlhf.engines.rollout.common import RolloutSpec
from rayrlhf.engines.rollout.vllm_start import GPU_PREFILL_TOKENS, _gpu_settings
from rayrlhf.errors import DeviceMemoryError, UserError
from tests.engines.rollout_cases import CONTEXT, make_requests, sample, start


@pytest.fixture(scope="module")
def replicas():
    """What two replicas did one after the other, with log-probs and without, in a process that has loaded numba."""
    import llvmlite.binding.ffi

    found = {"numba": llvmlite.binding.ffi, "rollouts": [], "models": [], "cache": []}
    for logprobs in (True, False):
        engine = start("vllm", logprobs=logprobs, memory_gib=100.0, max_concurrent=3)
        (model,) = engine._engine.apply_model(weakref.ref)
        assert model() is not None
        found["cache"].append(engine._engine.vllm_config.cache_config.kv_cache_memory_bytes)
        found["rollouts"].append(sample(engine, make_requests(1), max_new_tokens=4))
        if logprobs:
            longest = [RolloutRequest(SampleKey(0, 0, n), np.array([7], dtype=np.int32), seed=n) for n in range(3)]
            found["longest"] = sample(engine, longest, max_new_tokens=CONTEXT)
        engine.close()
        gc.collect()
        found["models"].append(model())
        engine.close()
    return found


def test_without_vllm_the_error_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else found(name, *rest))
    with pytest.raises(UserError, match=r"^rollout.backend: vllm is not installed; pip install 'rayrlhf\[cpu\]'.*$"):
        start("vllm")


@pytest.mark.parametrize(
    ("size", "backend"),
    [("tensor", "transformers"), ("pipeline", "transformers"), ("pipeline", "tests.testing.engines:Engine")],
)
def test_another_backend_has_one_device(size, backend):
    refused = rf"^rollout.{size}_parallel_size 2 needs rollout.backend 'vllm', found '{backend}'; expected 1$"
    with pytest.raises(UserError, match=refused):
        start(backend, **{f"{size}_parallel_size": 2})


def test_a_cache_too_small_for_one_response_is_the_users_to_mend():
    with pytest.raises(UserError, match=r"^rollout: vLLM cannot serve builtin:tiny.*$"):
        start("vllm", memory_gib=1e-5)


def test_a_gpu_that_others_fill_is_no_mistake_in_the_settings(monkeypatch):
    from vllm.v1.engine.llm_engine import LLMEngine

    def refuse(*_):
        raise ValueError("Free memory on device cuda:0 (3.1/79.1 GiB) on startup is less than desired GPU memory utilization.")

    monkeypatch.setattr(LLMEngine, "from_engine_args", refuse)
    with pytest.raises(DeviceMemoryError, match=r"^rollout: vLLM cannot serve builtin:tiny.*: Free memory on device cuda:0"):
        start("vllm")


def test_the_prefill_of_a_gpu_does_not_grow_with_the_models_context():
    section = RolloutSection(max_model_length=131_072)
    settings = _gpu_settings(RolloutSpec(ModelSection(path="builtin:tiny"), section, seed=0))
    assert settings["max_num_batched_tokens"] == GPU_PREFILL_TOKENS


def test_a_replica_starts_next_to_numba_and_leaves_its_modules_where_they_were(replicas):
    assert sys.modules["llvmlite.binding.ffi"] is replicas["numba"]


def test_a_cpu_replica_takes_no_more_cache_than_it_can_fill(replicas):
    assert len(replicas["longest"]) == 3
    token_bytes = 2 * 2 * 1 * 64 * 4  # keys and values, layers, heads, head size, float32
    for taken in replicas["cache"]:
        assert 3 * CONTEXT * token_bytes <= taken < 6 * CONTEXT * token_bytes


def test_a_closed_engine_gives_its_memory_back_and_another_can_start_which_without_logprobs_samples_the_same(replicas):
    assert replicas["models"] == [None, None]
    found = replicas["rollouts"]
    assert {key: one.response_ids.tolist() for key, one in found[0].items()} == {
        key: one.response_ids.tolist() for key, one in found[1].items()
    }
    assert all(np.isfinite(one.logprobs).all() for one in found[0].values())
    assert all(np.isnan(one.logprobs).all() for one in found[1].values())
