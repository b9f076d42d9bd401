"""The GPU check's steps on a CPU with tiny sizes and fakes: they pass, and each fails on a planted fault."""

import ctypes
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rayrlhf.actors.placement import ClusterResources, make_plan
from rayrlhf.config.section import GIB
from rayrlhf.engines.rollout.hf import TransformersRolloutEngine
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.models import logprobs
from rayrlhf.models.network import Network
from rayrlhf.observe.metric_names import LOGPROB_GAP
from rayrlhf.ppo.train_ppo import check_ppo
from rayrlhf.tools.gpu_check import (
    kernel_steps,
    machine_step,
    memory_steps,
    neighbor_process,
    run_steps,
    sampling_steps,
    speed_step,
    training_steps,
)
from rayrlhf.tools.gpu_check.random_work import random_sequences
from rayrlhf.tools.gpu_check.step_result import Notes, measure
from rayrlhf.tools.launch.model_shape import shape_of
from tests.observe.test_cuda import GOOD, FakeNVML

CPU = torch.device("cpu")
MODULES = (kernel_steps, machine_step, memory_steps, run_steps, sampling_steps, speed_step, training_steps)


def run(name):
    """Result of a step's function in this process."""
    (module,) = (module for module in MODULES if hasattr(module, name) and getattr(module, name).__module__ == module.__name__)
    notes = Notes()
    measure(f"{module.__name__}:{name}", CPU, notes.add)
    return notes.result(name, 0.0)


def missed(figures):
    return [figure.name for figure in figures if not figure.meets_bar]


def test_all_steps_without_ray_and_vllm_pass_with_the_packages_of_a_bare_machine():
    names = ["head", "packing", "training", "returned_memory", "transfer", "sampler", "speed"]
    command = [sys.executable, "-m", "tests.tools.gpu_check.bare_run", *names]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, check=False, capture_output=True, text=True, timeout=500, env=environment)
    assert output.returncode == 0, output.stderr[-4000:]
    results = json.loads(output.stdout.splitlines()[-1])
    assert [(one["status"], one["reason"], one["obstacle"]) for one in results] == [("passed", "", "")] * 7


@pytest.fixture
def nvml(monkeypatch):
    """A machine with 4 GPUs, by a stand-in for the driver's library."""

    class NVML(FakeNVML):
        mode = 0

        def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
            handle._obj.value = index.value + 1
            return 0

        def nvmlDeviceGetComputeMode(self, handle, mode):
            assert handle.value in (1, 2, 3, 4)
            mode._obj.value = self.mode
            return 0

    driver = NVML()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(machine_step, "find_spec", lambda name: None)
    monkeypatch.setattr(machine_step, "read_cuda", lambda: GOOD._replace(usable=4, devices=4))
    monkeypatch.setattr(machine_step.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * GIB))
    return driver


def test_a_good_machine_passes(nvml):
    result = run("machine")
    assert (result.status, result.reason) == ("passed", "")
    assert [figure.value for figure in result.figures if figure.name.startswith("compute mode")] == ["Default"] * 4


def test_a_machine_is_refused_for_each_of_its_faults(nvml, monkeypatch):
    nvml.mode = 3
    monkeypatch.setattr(machine_step, "read_cuda", lambda: GOOD._replace(usable=1, devices=2, driver="570.1"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(machine_step.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2**20))
    monkeypatch.setattr(machine_step, "find_spec", lambda name: True)
    monkeypatch.setattr(machine_step, "VLLM_EXTENSIONS", ("json", "json.not_there"))
    assert missed(run("machine").figures) == [
        "driver branch", "compute capability", "compute mode of GPU 0", "compute mode of GPU 1",
        "GPUs of the driver that torch cannot use", "free /dev/shm", "json.not_there",
    ]  # fmt: skip


def test_a_wrong_head_fails(monkeypatch):
    right = kernel_steps.logprobs_and_entropy

    def wrong(hidden, weight, bias, targets):
        logprobs, entropy = right(hidden, weight, bias, targets)
        return logprobs * 1.1, entropy

    monkeypatch.setattr(kernel_steps, "logprobs_and_entropy", wrong)
    result = run("head")
    assert result.status == "failed"
    assert "largest log-prob gap, float32" in missed(result.figures)
    assert "relative gradient gap of weight, bfloat16" in missed(result.figures)


def test_samples_that_attend_to_each_other_fail(monkeypatch):
    right = kernel_steps.collate

    def joined(sequences, width, device, *, packed=False):
        batch = right(sequences, width, device, packed=packed)
        lengths = [sum(batch.positions.lengths)] if packed else batch.positions.lengths
        return replace(batch, positions=batch.positions._replace(lengths=lengths))

    monkeypatch.setattr(kernel_steps, "collate", joined)
    assert {"largest log-prob gap, float32", "largest log-prob gap, bfloat16"} <= set(missed(run("packing").figures))


@pytest.mark.parametrize(
    ("names", "kernel"),
    [
        ({"aten::_scaled_dot_product_flash_attention", "void pytorch_flash::flash_fwd_kernel<...>", "aten::mm"}, "flash"),
        ({"aten::_scaled_dot_product_cudnn_attention"}, "cudnn"),
        ({"aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_attention_math"}, "math"),
        ({"aten::_scaled_dot_product_efficient_attention"}, "efficient"),
        ({"aten::mm", "aten::bmm"}, "none"),
    ],
)
def test_the_slowest_attention_kernel_is_named(names, kernel):
    assert kernel_steps.kernel_of(names) == kernel


def test_other_reference_weights_and_a_state_that_is_not_restored_fail(monkeypatch):
    right = training_steps.FrozenEngine
    other = "builtin:tiny?layers=2&hidden=64&context=128&init=0.1&seed=1"
    monkeypatch.setattr(
        training_steps, "FrozenEngine", lambda model, tokens: right(model.model_copy(update={"path": other}), tokens)
    )
    monkeypatch.setattr(TrainEngine, "load_captured", lambda *_: None)
    monkeypatch.setattr(training_steps, "two_updates", lambda *_, **__: torch.ones(3))
    assert missed(run("training").figures) == [
        "largest log-prob gap of policy and reference, bfloat16", "parameters that differ after a restored state",
    ]  # fmt: skip


def test_updates_that_differ_fail(monkeypatch):
    monkeypatch.setattr(training_steps, "two_updates", lambda *given, **_: torch.ones(3) * (1 + given[3] / 100))
    assert missed(run("training").figures) == [
        f"relative gap of two updates, ZeRO-{stage}, float32" for stage in ("1", "2", "3", "2, offloaded")
    ]


class FakeNeighbor:
    """Free MiB in the order in which they are read."""

    def __init__(self, *free):
        self.free, self.held = list(free), []

    def free_mib(self):
        return self.free.pop(0)

    def hold(self, mib):
        self.held.append(mib)

    def give_back(self):
        self.held.append(None)


@pytest.mark.parametrize(
    ("free", "faults"),
    [
        ((900.0, 880.0, 500.0, 490.0), []),
        ((900.0, 800.0, 500.0, 490.0), ["left by an offloaded reference"]),
        ((900.0, 880.0, 500.0, 400.0), ["left by a further update"]),
    ],
)
def test_memory_that_stays_fails(free, faults):
    assert missed(memory_steps.memory_figures(CPU, FakeNeighbor(*free))) == faults


def test_a_tensor_that_arrives_with_other_bits_in_the_first_pass_fails_and_sums_are_outside_the_clock(monkeypatch):
    right, sizes, clock = memory_steps.bits, [], count()

    def bits(tensor):  # in this process, not in the other one
        sizes.append(tensor.nbytes)
        next(clock)
        return right(tensor) + (len(sizes) == 1)

    monkeypatch.setattr(memory_steps, "bits", bits)
    monkeypatch.setattr(memory_steps, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    figures = {figure.name: figure for figure in run("transfer").figures}
    assert missed(figures.values()) == ["tensors that arrived with other bits"]
    seconds = len(sizes) / 2  # one tick from sending a tensor to its acknowledgement
    speed = figures["weights by CUDA IPC, tensor by tensor"].value
    assert speed == pytest.approx(sum(sizes) / 2 / seconds / 1e9)


def test_a_tensor_is_acknowledged_before_its_sum_is_computed(monkeypatch):
    sent = []
    connection = Mock(send=sent.append)
    connection.recv.side_effect = [None, torch.ones(2, dtype=torch.bfloat16), EOFError]
    monkeypatch.setattr(neighbor_process, "bits", lambda tensor: list(sent))
    neighbor_process.receive(connection, "cpu")
    assert sent == [True, True, [True, True]]


def test_log_probs_of_another_distribution_fail(monkeypatch):
    right = sampling_steps.generate

    def wrong(engine, device, temperature):
        return right(engine, device, 1.1 * temperature)

    monkeypatch.setattr(sampling_steps, "generate", wrong)
    assert len(missed(run("sampler").figures)) == 2


def test_new_weights_are_loaded_before_and_after_sleep_next_to_a_neighbor(monkeypatch):
    other = FakeNeighbor(1000.0, 600.0, 900.0, 900.0)
    figures = list(sampling_steps.sleep_figures(CPU, other, "transformers"))
    assert missed(figures) == []
    assert other.held == [270.0, None, 300.0]
    assert [figure.value for figure in figures if figure.name == "memory that sleep frees"] == [300.0]

    def stale(engine, bucket):
        engine._missing.clear()

    monkeypatch.setattr(TransformersRolloutEngine, "receive_weights", stale)
    figures = list(sampling_steps.sleep_figures(CPU, FakeNeighbor(1000.0, 600.0, 900.0, 900.0), "transformers"))
    assert missed(figures) == ["log-prob gap after load 1", "log-prob gap after load 2"]


METRICS = [{LOGPROB_GAP: 0.01, "sync/seconds": 2.0, "memory/policy_device_gib": gib} for gib in (1.0, 1.0, 2.0)]


@pytest.mark.parametrize(
    ("metrics", "faults"),
    [
        (METRICS, []),
        (METRICS[:2], ["steps, x"]),
        ([METRICS[0], METRICS[1] | {LOGPROB_GAP: 0.06}, METRICS[2]], ["log-prob gap of a run, x"]),
        ([*METRICS[:2], METRICS[2] | {"memory/policy_device_gib": 2.3}], ["memory of policy of the plan, x"]),
    ],
)
def test_a_run_is_judged_by_its_metrics(metrics, faults):
    assert missed(run_steps.run_figures(metrics, {"policy": 2 * GIB, "critic": GIB}, "x", 0.05)) == faults


@pytest.mark.parametrize(("step", "gpus"), [(run_steps.in_flight, 1), (run_steps.colocated, 1), (run_steps.several_gpus, 2)])
def test_the_runs_have_a_placement_on_their_gpus(monkeypatch, step, gpus):
    configs = []

    def fake(config):
        configs.append(config)
        if config.rollout.backend == "transformers":  # a CPU has all that this run needs
            check_ppo(config)
        return METRICS

    monkeypatch.setattr(run_steps, "tensor_parallel", lambda device: iter(()))
    assert missed(step(CPU, fake)) == []
    for config in configs:
        plan = make_plan(config, ClusterResources((16.0,), (float(gpus),)))
        assert sum(bundle.get("GPU", 0) for group in plan.groups.values() for bundle in group.bundles) == gpus
    monkeypatch.setattr(run_steps, "samples_with_vllm", lambda device: False)
    configs.clear()
    list(step(CPU, fake))
    if step is not run_steps.in_flight:
        assert {config.rollout.backend for config in configs} == {"transformers"}


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("step", ["vllm_sampler", "sleep", "in_flight", "colocated"])
def test_a_step_with_vllm_or_ray_runs_on_a_cpu(monkeypatch, step):
    # A CPU has no transfer from GPU to GPU, and reads no memory of a device.
    overrides = {"rollout.weight_transfer=ipc": "rollout.weight_transfer=shared_memory"}
    right = run_steps.run_config
    monkeypatch.setattr(
        run_steps, "run_config", lambda device, root, given: right(device, root, [overrides.get(one, one) for one in given])
    )
    result = run(step)
    assert (result.status, result.reason) == ("passed", "")


@pytest.mark.parametrize(("row", "tokens", "mfu"), [(16_384, 11_900, 11.1), (65_536, 10_100, 26.8)])
def test_operations_are_counted_as_in_the_published_figures(row, tokens, mfu):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        shape = shape_of(AutoModelForCausalLM.from_config(speed_step.qwen3_shape(row)))
    assert shape.parameters == pytest.approx(596e6, rel=0.001)
    speed, _, share = speed_step.speed_figures(shape, row, row / tokens, "NVIDIA H100 80GB HBM3")
    assert (speed.value, share.value) == (pytest.approx(tokens), pytest.approx(mfu, rel=0.01))
    assert speed.published == f"prime-rl, 1 x H100: {tokens:,}"
    _, _, bridged = speed_step.speed_figures(shape, row, row / tokens, "NVIDIA H100 NVL")
    assert bridged.value == pytest.approx(share.value * 989 / 835)
    assert len(list(speed_step.speed_figures(shape, row, 1.0, "unknown"))) == 2


@pytest.mark.parametrize("packed", [False, True])
def test_rows_meet_no_tensor_of_another_device_on_fake_tensors(monkeypatch, packed):
    """A build for CPUs has no backward pass of fake CUDA tensors, so the other device is `meta`, which has no autocast."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(logprobs, "product_dtype", lambda *_: torch.bfloat16)
    network = Network(AutoModelForCausalLM.from_config(speed_step.qwen3_shape(128, tiny=True)), None)
    network.accept_packed_rows()
    device = torch.device("meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = {}
        for module in network.modules():
            for name, held in module._parameters.items():
                if held is not None:
                    fake = torch.nn.Parameter(torch.empty(held.shape, dtype=torch.float32, device=device))
                    module._parameters[name] = fakes.setdefault(id(held), fake)
            for name, held in module._buffers.items():
                module._buffers[name] = torch.empty(held.shape, dtype=held.dtype, device=device)
        found, gradient = kernel_steps._scores(network, random_sequences((20, 33)), device, packed=packed)
        assert (found.device, found.dtype, found.shape) == (device, torch.float32, (37,))
        assert (gradient.device, gradient.dtype) == (device, torch.float32)
        with pytest.raises(RuntimeError, match="device"):
            kernel_steps._scores(network, random_sequences((20, 33)), CPU, packed=packed)
