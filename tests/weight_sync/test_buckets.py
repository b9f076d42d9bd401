"""New weights arrive whole in both samplers: fused, packed and tied layers included."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rayrlhf.engines.rollout.base import RolloutEngine
from rayrlhf.engines.rollout.common import START_VERSION
from rayrlhf.weight_sync.buckets import SharedTensor, WeightBucket, bucketed, from_shared, to_shared
from tests.engines.rollout_cases import gap, load_network, make_requests, sample, start

Started = tuple[RolloutEngine, bool]


@pytest.fixture(
    scope="module",
    params=[("transformers", True), ("vllm", True), ("vllm", False)],
    ids=["transformers-tied", "vllm-tied", "vllm-untied"],
)
def started(request: pytest.FixtureRequest) -> Iterator[Started]:
    backend, tie = request.param
    engine = start(backend, tie=tie)
    yield engine, tie
    engine.close()


@torch.no_grad()
def perturbed(*, tie: bool, seed: int) -> Any:
    """The start model after a step no optimizer would take, so that old weights anywhere would show."""
    network = load_network(tie=tie)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
    return network


def buckets_of(network: Any, bucket_bytes: int) -> Iterator[WeightBucket]:
    """The weights as a trainer ships them, a tied one once, in memory that is reused for the next bucket."""
    for bucket in bucketed(network.named_parameters(), bucket_bytes):
        copies = [(name, tensor.detach().clone()) for name, tensor in bucket]
        yield copies
        for _, tensor in copies:
            tensor.fill_(float("nan"))


def load(engine: RolloutEngine, version: int, buckets: Iterator[WeightBucket]) -> None:
    engine.begin_weights(version)
    for bucket in buckets:
        engine.receive_weights(bucket)
    engine.finish_weights()


@pytest.mark.parametrize("bucket_bytes", [1, 300_000, 2**30], ids=["a tensor a bucket", "layers cut", "one bucket"])
def test_after_a_load_the_sampler_says_what_the_new_weights_say(started, bucket_bytes):
    engine, tie = started
    network = perturbed(tie=tie, seed=bucket_bytes)
    assert gap(network, sample(engine, make_requests(2)).values()) > 0.1
    load(engine, 7, buckets_of(network, bucket_bytes))
    rollouts = sample(engine, make_requests(4)).values()
    assert gap(network, rollouts) < 2e-5
    assert {int(version) for rollout in rollouts for version in rollout.versions} == {7}
    for rollout in sample(engine, make_requests(1), temperature=0.0).values():
        prompt = torch.from_numpy(rollout.prompt_ids).long()[None]
        expected = network.generate(prompt, do_sample=False, max_new_tokens=24)[0, prompt.shape[1] :]
        assert rollout.response_ids.tolist() == expected.tolist()


def test_weights_in_bfloat16_are_cast_on_the_way_in(started):
    engine, tie = started
    network = perturbed(tie=tie, seed=5)
    half = [(name, tensor.detach().bfloat16()) for name, tensor in network.named_parameters()]
    load(engine, 8, bucketed(half, 300_000))
    assert gap(network, sample(engine, make_requests(2)).values()) > 1e-4
    network.load_state_dict(dict(half), strict=False)
    assert gap(network, sample(engine, make_requests(2)).values()) < 2e-5


def test_weights_are_read_from_arrays_that_cannot_be_written(started):
    engine, tie = started
    network = perturbed(tie=tie, seed=6)

    def shipped() -> Iterator[WeightBucket]:
        for bucket in bucketed(network.named_parameters(), 300_000):
            shared = [SharedTensor(name, dtype, data.copy()) for name, dtype, data in to_shared(bucket)]
            for tensor in shared:
                tensor.data.flags.writeable = False
            yield from_shared(shared)

    load(engine, 9, shipped())
    assert gap(network, sample(engine, make_requests(2)).values()) < 2e-5


def test_a_tied_checkpoint_may_name_its_output_layer_too(started):
    engine, tie = started
    network = perturbed(tie=tie, seed=7)
    load(engine, 10, bucketed(network.state_dict().items(), 300_000))
    assert gap(network, sample(engine, make_requests(2)).values()) < 2e-5


def test_weights_that_did_not_all_come_stop_the_sampler_until_the_rest_has(started):
    engine, tie = started
    network = perturbed(tie=tie, seed=8)
    tensors = [(name, tensor.detach()) for name, tensor in network.named_parameters()]
    late = [pair for pair in tensors if ".1.self_attn.k_proj" in pair[0] or ".0.mlp.down_proj" in pair[0]]
    before = engine.version
    engine.begin_weights(11)
    engine.receive_weights([pair for pair in tensors if pair not in late])
    with pytest.raises(ValueError, match=r"weight update ended with.*(qkv_proj|k_proj|down_proj)"):
        engine.finish_weights()
    with pytest.raises(RuntimeError, match="weight version 11 is still being loaded"):
        engine.submit(make_requests(1), temperature=1.0, max_new_tokens=4)
    assert engine.version == before
    engine.receive_weights(late)
    engine.finish_weights()
    assert engine.version == 11
    assert gap(network, sample(engine, make_requests(2)).values()) < 2e-5


def test_weights_do_not_change_under_unfinished_requests(started):
    engine, _ = started
    engine.submit(make_requests(1), temperature=1.0, max_new_tokens=4)
    with pytest.raises(RuntimeError, match="4 requests are unfinished"):
        engine.begin_weights(12)
    assert len(engine.poll(4)) == 4
    with pytest.raises(RuntimeError, match="without begin_weights"):
        engine.finish_weights()


def test_an_engine_that_got_no_weights_yet_says_so():
    engine = start("transformers")
    assert engine.version == START_VERSION
    rollouts = sample(engine, make_requests(1), max_new_tokens=3).values()
    assert {int(version) for rollout in rollouts for version in rollout.versions} == {START_VERSION}


@pytest.mark.slow
def test_in_bfloat16_the_gap_stays_small_after_a_load():
    engine = start("vllm", dtype="bfloat16")
    network = perturbed(tie=True, seed=9).bfloat16()
    load(engine, 1, buckets_of(network, 300_000))
    rollouts = sample(engine, make_requests(4)).values()
    engine.close()
    assert gap(network, rollouts, average=True) < 0.05
