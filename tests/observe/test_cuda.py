"""Why GPUs cannot be used: each cause has its words, and all commands that need a GPU end with them in one line."""

import ctypes
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from rayrlhf.batch_inference.generation import check_generator
from rayrlhf.cli import main
from rayrlhf.config.batch_inference import GenerateSection
from rayrlhf.errors import UserError
from rayrlhf.observe import cuda
from rayrlhf.observe.cuda import CudaFacts, check_devices, find_fault, read_cuda
from rayrlhf.ppo.train_ppo import check_ppo
from tests.engines.rollout_cases import start
from tests.ppo.runs import run_config

GOOD = CudaFacts("2.13.0+cu130", "13.0", 1, "580.95.05", 1, None)
CPU_BUILD = GOOD._replace(torch="2.13.0+cpu", build=None, usable=0)
NO_DRIVER = GOOD._replace(usable=0, driver=None, devices=0)
FAULTS = [
    (CPU_BUILD, r"torch 2\.13\.0\+cpu is a build without CUDA", r"^pip install --no-deps -r requirements/gpu\.txt"),
    (NO_DRIVER, "no NVIDIA driver", "--gpus all"),
    (GOOD._replace(usable=0, driver="570.86.15"), r"driver 570\.86\.15 is too old for CUDA 13\.0", "580 or newer"),
    (GOOD._replace(usable=0, build="12.8", driver="470.1"), r"driver 470\.1 is too old for CUDA 12\.8", "525 or newer"),
    (GOOD._replace(usable=0, visible=""), "CUDA_VISIBLE_DEVICES= hides the 1 GPUs", "unset it"),
    (GOOD._replace(usable=0, devices=0), "no visible GPU", "with GPUs"),
    (GOOD._replace(usable=0), "torch cannot start CUDA on 1 GPUs", "says why"),
]


class FakeNVML:
    """The driver's library, as far as it is read."""

    def nvmlInit_v2(self):
        return 0

    def nvmlSystemGetDriverVersion(self, text, _):
        text.value = b"570.86.15"
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 4
        return 0


@pytest.fixture
def gpu_wheel(monkeypatch):
    """vLLM's GPU build on a machine without a driver, and no cluster to join."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("rayrlhf.actors.connection.ambient_address", lambda: "local")
    monkeypatch.setattr(cuda, "version", lambda name: "0.32.0")
    monkeypatch.setattr(cuda, "read_cuda", lambda: NO_DRIVER)


def test_a_usable_gpu_has_no_fault():
    assert find_fault(GOOD) is None


@pytest.mark.parametrize(("facts", "found", "fix"), FAULTS)
def test_each_cause_is_named_with_its_mend(facts, found, fix):
    fault = find_fault(facts)
    assert re.search(found, fault.found)
    assert re.search(fix, fault.fix)


def test_driver_and_devices_are_read_from_the_drivers_library(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeNVML())
    facts = read_cuda()
    assert (facts.driver, facts.devices) == ("570.86.15", 4)
    monkeypatch.setattr(cuda, "read_cuda", lambda: GOOD._replace(usable=0, driver=facts.driver, devices=facts.devices))
    with pytest.raises(
        UserError, match=r"this machine has 4 GPUs, but NVIDIA driver 570\.86\.15 is too old .*VISIBLE_DEVICES="
    ):
        check_devices()
    monkeypatch.setattr(cuda, "read_cuda", lambda: GOOD._replace(usable=0, devices=4, visible=""))
    check_devices()  # what is hidden is not counted by Ray either


@pytest.mark.usefixtures("gpu_wheel")
def test_a_gpu_build_without_a_gpu_is_one_line_before_ray_and_before_models(tmp_path):
    message = r"^rollout\.backend: vllm 0\.32\.0 computes on GPUs only, and no NVIDIA driver; install one, or .*$"
    config = run_config(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        check_ppo(config)
    assert "\n" not in str(caught.value)
    assert not config.run.root.exists()
    with pytest.raises(UserError, match=message):
        start("vllm")
    with pytest.raises(UserError, match=message.replace("rollout", "generate")):
        check_generator(GenerateSection())
    check_ppo(run_config(tmp_path, "rollout.backend=transformers"))


@pytest.mark.usefixtures("gpu_wheel")
def test_a_cluster_may_have_the_gpus_that_the_drivers_machine_lacks():
    check_generator(GenerateSection(), "auto")


@pytest.mark.usefixtures("gpu_wheel")
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_the_command_ends_with_exit_code_2_and_nothing_else(monkeypatch, capsys, dry):
    monkeypatch.setattr("sys.argv", ["rayrlhf", "quickstart", *dry])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert [line[:30] for line in capsys.readouterr().err.splitlines()] == ["rayrlhf: rollout.backend: vllm"]


def test_no_pin_of_the_gpu_lock_takes_a_build_for_cpus():
    lines = (Path(__file__).parents[2] / "requirements" / "gpu.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line.startswith("torch") and not line.startswith("torch-c")]
    assert {pin.name for pin in pins} == {"torch", "torchaudio", "torchcodec", "torchvision"}
    for pin in pins:
        (one,) = pin.specifier
        assert pin.specifier.contains(one.version)
        assert not pin.specifier.contains(f"{one.version}+cpu")
