"""A replica over two devices: two worker processes on a CPU, which load every update and end with the replica."""

import tomllib
from importlib import metadata
from pathlib import Path

import psutil
import pytest
import torch

from rayrlhf.weight_sync.buckets import bucketed
from tests.engines.rollout_cases import gap, load_network, make_requests, sample, start


def perturb(network, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)


def send(engine, version, network):
    engine.begin_weights(version)
    for bucket in bucketed(((name, parameter.detach()) for name, parameter in network.named_parameters()), 2**16):
        engine.receive_weights(bucket)
    engine.finish_weights()


@pytest.mark.slow
@pytest.mark.parametrize("key", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_workers_sample_from_every_update_and_end_with_the_engine(monkeypatch, key):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shared = set(Path("/dev/shm").iterdir())
    engine, network = start("vllm", **{key: 2}), load_network()
    left = [path.name for path in set(Path("/dev/shm").iterdir()) - shared if "cpushm" in path.name]
    assert left == [], "the memory of the workers' collectives has no name that a kill could leave behind"
    workers = [child for child in psutil.Process().children(recursive=True) if "Worker_" in " ".join(child.cmdline())]
    assert len(workers) == 2
    patched = engine._engine.collective_rpc(few_shapes)
    assert patched == [True, True]
    before = sample(engine, make_requests(2))
    gaps = [gap(network, before.values())]
    for version in (0, 1):
        perturb(network, version)
        send(engine, version, network)
        rollouts = sample(engine, make_requests(2, step=version + 1))
        gaps.append(gap(network, rollouts.values()))
        assert {one for rollout in rollouts.values() for one in rollout.versions.tolist()} == {version}
    assert gap(network, before.values()) > 0.1
    assert max(gaps) < 1e-5
    engine.close()
    assert not [child for child in workers if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def few_shapes(worker):
    """Whether the products of a worker are padded to few shapes."""
    from vllm import _custom_ops

    return hasattr(_custom_ops, "rayrlhf_few_shapes")


def test_the_package_registers_its_transfers_with_every_vllm_process():
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    ((name, path),) = project["entry-points"]["vllm.general_plugins"].items()
    register = metadata.EntryPoint(name, path, "vllm.general_plugins").load()
    register()
    register()
    assert {"rayrlhf_shared_memory", "rayrlhf_nccl", "rayrlhf_ipc"} <= set(WeightTransferEngineFactory._registry)
