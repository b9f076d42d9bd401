"""The steps of the GPU check, their processes, and the table at the end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from rayrlhf.errors import UserError
from rayrlhf.observe.cuda import find_fault, read_cuda
from rayrlhf.tools.gpu_check.step_process import STARTED
from rayrlhf.tools.gpu_check.step_result import Notes, Step, StepResult

PACKAGE = "rayrlhf.tools.gpu_check"
STEPS = (
    Step("1 machine", f"{PACKAGE}.machine_step:machine", 15),
    Step("2 log-prob head", f"{PACKAGE}.kernel_steps:head", 20),
    Step("3 packed rows", f"{PACKAGE}.kernel_steps:packing", 20),
    Step("4 training", f"{PACKAGE}.training_steps:training", 40),
    Step("5 returned memory", f"{PACKAGE}.memory_steps:returned_memory", 20),
    Step("6 weights between processes", f"{PACKAGE}.memory_steps:transfer", 20),
    Step("7 sampler", f"{PACKAGE}.sampling_steps:sampler", 20),
    Step("7 sampler, vLLM", f"{PACKAGE}.sampling_steps:vllm_sampler", 60, ("vllm",)),
    Step("8 weight sync and sleep, vLLM", f"{PACKAGE}.sampling_steps:sleep", 50, ("vllm",)),
    Step("8 weight sync in flight, vLLM", f"{PACKAGE}.run_steps:in_flight", 65, ("vllm", "ray")),
    Step("9 PPO on one GPU", f"{PACKAGE}.run_steps:colocated", 90, ("ray",)),
    Step("10 several GPUs", f"{PACKAGE}.run_steps:several_gpus", 180, ("ray",), gpus=2),
    Step("speed of a training step", f"{PACKAGE}.speed_step:speed", 60),
)
"""All steps; those of one GPU take at most 480 s together, imports left out."""
IMPORT_SECONDS = 120.0
"""Limit for the imports of a step; the first ones of a machine read gigabytes."""
END_SECONDS = 10.0
POLL_SECONDS = 0.1
MARKS = {"passed": "passed ", "failed": "FAILED ", "skipped": "skipped"}


def run_gpu_check(*, as_json: bool, echo: Callable[[str], None]) -> bool:
    """Run all steps and print figures and table; returns True if none failed.

    Raises:
        UserError: no usable GPU.
    """
    gpus = usable_gpus()
    results = []
    for step in STEPS:
        results.append(run_step(step, "cuda", gpus))
        if not as_json:
            echo(step_lines(results[-1]))
    echo(json.dumps([result.as_dict() for result in results], indent=1, allow_nan=False) if as_json else table(results))
    return not any(result.status == "failed" for result in results)


def usable_gpus() -> int:
    """Return the number of GPUs that torch can use.

    Raises:
        UserError: there is none; names the reason.
    """
    facts = read_cuda()
    fault = find_fault(facts)
    if fault is not None:
        raise UserError(f"doctor --gpu: no usable GPU: {fault.found}; {fault.fix}")
    return facts.usable


def run_step(step: Step, device: str, gpus: int) -> StepResult:
    """Run a step in its own process; it ends with this call.

    Args:
        device: `cuda`, or `cpu` with tiny sizes.
        gpus: of this machine.
    """
    if reason := step.obstacle(gpus):
        return StepResult(step.name, "skipped", reason=reason)
    with TemporaryDirectory(prefix="gpu-check") as folder:
        lines, log = Path(folder) / "lines", Path(folder) / "log"
        lines.touch()
        command = [sys.executable, "-m", "rayrlhf.tools.gpu_check.step_process", step.function, device, str(lines)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "RAYRLHF_CACHE": f"{folder}/cache"}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, env=environment
            )
        try:
            overrun, seconds = _wait(process, lines, step.seconds)
        finally:
            _end(process)
        notes = Notes()
        for line in _read(lines):
            if STARTED not in line:
                notes.add(line)
        if notes.status is None:
            last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"])[-1]
            notes.reason = overrun or f"its process ended with {process.returncode}: {last}"
        return notes.result(step.name, seconds)


def _wait(process: "subprocess.Popen[bytes]", lines: Path, limit: float) -> tuple[str, float]:
    """Wait for a step's last line; returns any overrun in words, and its seconds."""
    began, started = time.monotonic(), None
    while True:
        ended = process.poll() is not None
        found = _read(lines)
        now = time.monotonic()
        if started is None and found:
            started = now
        if ended or any("status" in line for line in found):
            return "", now - (started or began)
        if started is None and now - began > IMPORT_SECONDS:
            return f"imports not finished after {IMPORT_SECONDS:g} s", now - began
        if started is not None and now - started > limit:
            return f"not finished after {limit:g} s", now - started
        time.sleep(POLL_SECONDS)


def _read(lines: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file that may be written to."""
    return [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a step's process and all others of its session."""
    _signal(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    _signal(process, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + END_SECONDS
    while _runs(process.pid) and time.monotonic() < deadline:  # a killed process ends a moment after the signal
        time.sleep(POLL_SECONDS)


def _runs(group: int) -> bool:
    """Return whether a process of a group still runs."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _signal(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # none of the session is left
        os.killpg(process.pid, number)


def step_lines(result: StepResult) -> str:
    """Return a step's result and its figures as text."""
    reason = f": {result.reason}" if result.reason else ""
    first = f"{MARKS[result.status]}  {result.name} ({result.seconds:.0f} s){reason}"
    return "\n".join([first, *(f"           {figure.line()}" for figure in result.figures)])


def table(results: Sequence[StepResult]) -> str:
    """Return the headline figures, the steps that did not pass, and the counts."""
    rows = [("figure", "measured", "bar", "published")]
    for figure in (figure for result in results for figure in result.figures if figure.headline):
        missed = "" if figure.meets_bar else "MISSED: "
        rows.append((figure.name, figure.measured, f"{missed}{figure.bar}", figure.published))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"{MARKS[result.status]}  {result.name}: {result.reason}" for result in results if result.status != "passed"]
    counts = ", ".join(f"{sum(result.status == status for result in results)} {status}" for status in MARKS)
    return "\n".join([*lines, f"{counts} in {sum(result.seconds for result in results):.0f} s"])
