"""`math_verify`: equality of mathematical expressions, decided by the library Math-Verify.

It runs in a separate process (`rayrlhf.rewards.math_worker`), because an answer such as 9^9^9^9 can compute forever without
checking for signals. A comparison that takes more than `seconds` of CPU time is killed and the response counts as wrong. CPU
time is measured instead of wall time, so that a busy machine fails no response.
"""

import atexit
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
from contextlib import suppress

import psutil

from rayrlhf.errors import UserError

WALL_FACTOR = 30.0
"""Wall time limit of a comparison as a multiple of its CPU time limit, in case the process sleeps."""
POLL_SECONDS = 0.2

_lock = threading.Lock()


class _Worker:
    """Process that compares expressions, started on first use and again after a kill."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def compare(self, answer: str, response: str, seconds: float) -> bool | None:
        """Return the verdict; False if the process exceeds `seconds` of CPU time or dies."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        spent = _cpu_seconds(process)
        try:
            process.stdin.write(json.dumps({"answer": answer, "response": response}) + "\n")
            process.stdin.flush()
        except OSError:  # it died before reading
            self.end()
            return self.compare(answer, response, seconds)
        for _ in range(int(seconds * WALL_FACTOR / POLL_SECONDS) + 1):
            if select.select([process.stdout], [], [], POLL_SECONDS)[0]:
                line = process.stdout.readline()
                if line:
                    verdict: bool | None = json.loads(line)
                    return verdict
                break
            if _cpu_seconds(process) - spent > seconds:
                break
        self.end()
        return False

    def end(self) -> None:
        """Kill the process; the next comparison starts another one."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self.end()
            command = [sys.executable, "-m", "rayrlhf.rewards.math_worker"]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
            )
            # A comparison with a known result first: a failure here is not caused by a response.
            self._self_test(self._process)
        return self._process

    def _self_test(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):
            process.stdin.write(json.dumps({"answer": "1/2", "response": "$0.5$"}) + "\n")
            process.stdin.flush()
        if process.stdout.readline() != "true\n":
            self.end()
            raise UserError("reward function 'math_verify': its process does not start; check the package `math-verify`")


_worker = _Worker()
atexit.register(_worker.end)


def math_verify(responses: list[str], answer: list[str | int | float], seconds: float = 5.0) -> list[float]:
    r"""Return 1.0 for each response whose last expression equals the reference's, else 0.0.

    Args:
        responses: [B]. Compared is LaTeX between dollar signs or in `\boxed{}`, else the last number or simple expression.
        answer: [B], the dataset's column: an expression, LaTeX, or a solution that ends in `\boxed{}`.
        seconds: CPU time limit of one comparison.

    Raises:
        UserError: the library is not installed, or a reference answer has no expression.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("reward function 'math_verify' needs the package `math-verify`: pip install 'rayrlhf[math]'")
    if seconds <= 0:
        raise UserError(f"reward function 'math_verify': seconds {seconds:g}: expected more than 0")
    rewards = []
    with _lock:
        for index, (response, expected) in enumerate(zip(responses, answer, strict=True)):
            verdict = _worker.compare(str(expected), response, seconds)
            if verdict is None:
                raise UserError(
                    f"column 'answer' of sample {index} has no expression: {str(expected)[:60]!r}; expected a number or LaTeX"
                )
            rewards.append(float(verdict))
    return rewards


def _cpu_seconds(process: subprocess.Popen[str]) -> float:
    try:
        times = psutil.Process(process.pid).cpu_times()
    except psutil.Error:  # it has ended; its output decides
        return 0.0
    return float(times.user + times.system)
