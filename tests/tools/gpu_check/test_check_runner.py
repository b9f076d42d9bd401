"""The GPU check's frame, on steps that pass, miss a bar, raise, crash and hang: bars, processes, table, exit codes."""

import json
import os

import psutil
import pytest

from rayrlhf.cli import main
from rayrlhf.tools.gpu_check import check_runner
from rayrlhf.tools.gpu_check.check_runner import STEPS, run_step, step_lines, table
from rayrlhf.tools.gpu_check.step_result import Figure, Step, StepResult, resolve
from tests.observe.test_cuda import GOOD

NAN = float("nan")
FAKE_STEPS = """
import os, subprocess, sys, time
from rayrlhf.tools.gpu_check.step_result import Figure, StepSkippedError

def good(device):
    print("noise of a library")
    yield Figure("gap", 0.01, "nats", at_most=0.03)
    yield Figure("kernel", "flash", among=("flash", "cudnn"))

def misses(device):
    yield Figure("gap", float("nan"), "nats", at_most=0.03)
    yield Figure("kernel", "math", among=("flash", "cudnn"))
    yield Figure("speed", 5.0)

def raises(device):
    yield Figure("gap", 0.01)
    raise ValueError(f"no device {device}\\nmore")

def crashes(device):
    yield Figure("gap", 0.01)
    sys.stderr.write("CUDA error: an illegal memory access\\n")
    sys.stderr.flush()
    os.abort()

def hangs(device):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield Figure("child", float(child.pid))
    time.sleep(600)

def skips(device):
    raise StepSkippedError("the build for CPUs")
    yield

def silent(device):
    yield from ()
"""


@pytest.fixture
def fake_steps(tmp_path, monkeypatch):
    """Steps of a process that starts in 0.2 s, as torch is replaced there."""
    (tmp_path / "fake_steps.py").write_text(FAKE_STEPS)
    (tmp_path / "torch.py").write_text("device = str\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)


@pytest.mark.parametrize(
    ("name", "status", "reason", "figures"),
    [
        ("good", "passed", "", 2),
        ("misses", "failed", "gap: nan nats (at most 0.03); kernel: math (flash or cudnn)", 3),
        ("raises", "failed", "ValueError: no device cpu", 1),
        ("crashes", "failed", "its process ended with -6: CUDA error: an illegal memory access", 1),
        ("skips", "skipped", "the build for CPUs", 0),
        ("silent", "failed", "no figure was measured", 0),
        ("missing", "failed", "AttributeError: module 'fake_steps' has no attribute 'missing'", 0),
    ],
)
def test_a_step_ends_as_its_process_did(fake_steps, name, status, reason, figures):
    result = run_step(Step(name, f"fake_steps:{name}", 60), "cpu", 1)
    assert (result.status, result.reason, len(result.figures)) == (status, reason, figures)


def test_a_step_that_hangs_ends_with_its_children_and_keeps_its_figures(fake_steps, monkeypatch):
    monkeypatch.setattr(check_runner, "END_SECONDS", 5.0)
    result = run_step(Step("hangs", "fake_steps:hangs", 0.5), "cpu", 1)
    assert (result.status, result.reason) == ("failed", "not finished after 0.5 s")
    (child,) = result.figures
    assert not psutil.pid_exists(int(child.value)) or psutil.Process(int(child.value)).status() == psutil.STATUS_ZOMBIE


def test_a_step_is_skipped_where_something_is_missing():
    needs = run_step(Step("vLLM", "none:none", 1, ("json", "not_installed")), "cuda", 1)
    assert (needs.status, needs.reason) == ("skipped", "not installed: not_installed")
    gpus = run_step(Step("several", "none:none", 1, gpus=2), "cuda", 1)
    assert (gpus.status, gpus.reason) == ("skipped", "needs 2 GPUs, found 1")


def test_all_ten_steps_are_there_and_fit_into_8_minutes():
    assert {step.name.split()[0] for step in STEPS} >= {str(number) for number in range(1, 11)}
    assert sum(step.seconds for step in STEPS if step.gpus == 1) <= 480
    assert all(callable(resolve(step.function)) for step in STEPS)


@pytest.mark.parametrize(
    ("figure", "meets", "line"),
    [
        (Figure("a", 0.03, "nats", at_most=0.03), True, "a: 0.03 nats (at most 0.03)"),
        (Figure("a", 0.031, at_most=0.03), False, "a: 0.031 (at most 0.03)"),
        (Figure("a", NAN, at_most=0.03), False, "a: nan (at most 0.03)"),
        (Figure("a", NAN, at_least=0.03), False, "a: nan (at least 0.03)"),
        (Figure("a", NAN), True, "a: nan"),
        (Figure("a", 12345.6, "MiB", at_least=5000), True, "a: 12,346 MiB (at least 5,000)"),
        (Figure("a", 1.0, at_least=1.0, at_most=1.0), True, "a: 1 (at most 1, at least 1)"),
        (Figure("a", "math", among=("flash",)), False, "a: math (flash)"),
        (Figure("a", "580.95"), True, "a: 580.95"),
    ],
)
def test_a_bar_decides(figure, meets, line):
    assert figure.meets_bar == meets
    assert figure.line() == line


RESULTS = [
    StepResult("1 machine", "passed", (Figure("driver", "580.95.05", headline=True), Figure("branch", 580.0)), "", 3.2),
    StepResult("7 sampler", "failed", (Figure("gap", 0.2, "nats", at_most=0.03, headline=True),), "gap: 0.2 nats", 20.0),
    StepResult("8 sleep", "skipped", (), "not installed: vllm"),
    StepResult(
        "speed", "passed", (Figure("step", 12345.0, "tokens/s", headline=True, published="prime-rl: 11,900"),), "", 60.0
    ),
]
TABLE = """\
figure  measured         bar                   published
driver  580.95.05
gap     0.2 nats         MISSED: at most 0.03
step    12,345 tokens/s                        prime-rl: 11,900
FAILED   7 sampler: gap: 0.2 nats
skipped  8 sleep: not installed: vllm
2 passed, 1 failed, 1 skipped in 83 s"""


def test_the_table_has_the_headlines_then_the_steps_that_did_not_pass():
    assert table(RESULTS) == TABLE
    assert step_lines(RESULTS[1]) == "FAILED   7 sampler (20 s): gap: 0.2 nats\n           gap: 0.2 nats (at most 0.03)"


@pytest.fixture
def command(monkeypatch):
    """Run `rayrlhf doctor --gpu` and return its exit code."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["rayrlhf", "doctor", "--gpu", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    return run


def test_the_command_without_a_gpu_is_one_line_and_exit_code_2(command, monkeypatch, capsys):
    monkeypatch.setattr(check_runner, "read_cuda", lambda: GOOD._replace(usable=0, driver="570.1"))
    assert command() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "rayrlhf: doctor --gpu: no usable GPU: NVIDIA driver 570.1 is too old for CUDA 13.0 of torch 2.13.0+cu130; "
        "update the driver to 580 or newer\n"
    )


def test_values_that_json_does_not_have_are_text():
    figures = (Figure("gap", NAN, at_most=0.03), Figure("ratio", float("inf")), Figure("speed", 5.0))
    values = StepResult("7 sampler", "failed", figures).as_dict()
    assert [figure["value"] for figure in values["figures"]] == ["nan", "inf", 5.0]
    json.dumps(values, allow_nan=False)


@pytest.mark.parametrize(("results", "code"), [(RESULTS, 1), ([RESULTS[0], RESULTS[2]], 0)])
def test_the_exit_code_is_1_where_a_bar_is_missed(command, monkeypatch, capsys, results, code):
    monkeypatch.setattr(check_runner, "read_cuda", lambda: GOOD)
    left = list(results)
    monkeypatch.setattr(check_runner, "STEPS", [Step(result.name, "none:none", 1) for result in results])
    monkeypatch.setattr(check_runner, "run_step", lambda step, device, gpus: left.pop(0))
    assert command() == code
    assert capsys.readouterr().out.endswith(f"{table(results)}\n")
    left = list(results)
    assert command("--json") == code
    assert [one["status"] for one in json.loads(capsys.readouterr().out)] == [result.status for result in results]
