"""`code`: does the Python program in a response do what it should? It runs in the sandbox and is judged there.

Two kinds of task, by the columns that the dataset has. `expected_output`: the program reads `stdin` and what it prints is
compared, outside of the sandbox. `tests`: Python statements that run after the program, in its names, each by itself; one that
raises has failed. The harness prints its verdict behind a word that only it knows, so that a program that leaves early or
prints what a verdict looks like passes nothing. Tests share a process with the program, so a program that looks for the harness
in memory, or returns objects that equal everything, could cheat them; compare outputs where that matters.

A program that is wrong, too slow or too greedy has reward 0. A sandbox that cannot run it is an error and never a reward.
"""

import json
import os
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rayrlhf.errors import UserError
from rayrlhf.rewards.fenced import Where, check_where, last_block
from rayrlhf.rewards.sandbox import Limits, SandboxError, Unsafe, run_program

HARNESS = """\
import json, os
with open("harness.json") as file:
    given = json.load(file)
os.remove("harness.json")
names = {"__name__": "__main__"}
exec(compile(given.pop("program"), "program", "exec"), names)
passed = []
for test in given["tests"]:
    try:
        exec(compile(test, "test", "exec"), names)
        passed.append(True)
    except Exception:
        passed.append(False)
print("\\n" + given["word"] + json.dumps(passed), flush=True)
"""
"""`main.py` of a program with tests."""


@dataclass(frozen=True, slots=True)
class _Task:
    program: str
    stdin: str
    tests: list[str] | None
    expected: str | None


def code(
    responses: list[str],
    tests: list[list[str] | str | None] | None = None,
    stdin: list[str | None] | None = None,
    expected_output: list[str | None] | None = None,
    where: Where = "fenced",
    partial: bool = False,
    cpu_seconds: int = 5,
    wall_seconds: float = 20.0,
    memory_mib: int = 512,
    processes: int = 8,
    concurrency: int | None = None,
    unsafe: Unsafe = "refuse",
) -> list[float | None]:
    """Return 1.0 for each response whose program passes everything, else 0.0; None for a row with neither kind of task.

    Args:
        responses: [B].
        tests: [B], column: Python statements, one text or a list of texts that are run one by one.
        stdin: [B], column: what the program reads.
        expected_output: [B], column: what it must print, up to space at the ends of lines and of the whole.
        where: `fenced` takes the last block of three backticks, `whole` the response as it is.
        partial: reward the share of the tests that pass, instead of all or nothing.
        cpu_seconds: CPU time of each process.
        wall_seconds: longest time from start to end.
        memory_mib: memory of each process, in MiB.
        processes: most processes and threads at a time.
        concurrency: programs at a time; as many as this process has cores when not given.
        unsafe: where programs cannot be contained, `refuse`, or `warn` and run with resource limits alone.

    Raises:
        UserError: an argument or a column is wrong, or programs cannot be contained here and `unsafe` is `refuse`.
    """
    check_where("code", where)
    if unsafe not in ("refuse", "warn"):
        raise UserError(f"reward function 'code': unsafe {unsafe!r}: expected 'refuse' or 'warn'")
    if tests is None and expected_output is None:
        raise UserError("reward function 'code' needs a column 'tests' or 'expected_output' in the dataset")
    limits = Limits(cpu_seconds=cpu_seconds, wall_seconds=wall_seconds, memory_mib=memory_mib, processes=processes)
    nothing: list[None] = [None] * len(responses)
    columns = zip(responses, tests or nothing, stdin or nothing, expected_output or nothing, strict=True)
    jobs = [
        _Task(
            response if where == "whole" else last_block(response, ("python", "py")),
            given or "",
            None if own is None else _tests(index, own),
            expected,
        )
        for index, (response, own, given, expected) in enumerate(columns)
    ]

    def judged(task: _Task) -> float | None:
        return judge(task.program, task.stdin, task.tests, task.expected, limits, partial=partial, unsafe=unsafe)

    with ThreadPoolExecutor(concurrency or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(judged, jobs))


def judge(
    program: str,
    stdin: str,
    tests: Sequence[str] | None,
    expected_output: str | None,
    limits: Limits,
    *,
    partial: bool = False,
    unsafe: Unsafe = "refuse",
) -> float | None:
    """Run one program against its tests, its expected output, or both; arguments and errors as for `code`."""
    if tests is None and expected_output is None:
        return None
    if not program.strip():
        return 0.0
    try:
        shares = []
        if expected_output is not None:
            outcome = run_program({"main.py": program}, stdin=stdin, limits=limits, unsafe=unsafe)
            shares.append(float(outcome.status == 0 and _lines(outcome.stdout) == _lines(expected_output)))
        if tests is not None:
            shares.append(_share_passed(program, stdin, tests, limits, unsafe))
    except SandboxError as error:
        raise UserError(f"reward function 'code': the sandbox could not run a program: {error}") from error
    return min(shares) if partial else float(all(share == 1.0 for share in shares))


def _share_passed(program: str, stdin: str, tests: Sequence[str], limits: Limits, unsafe: Unsafe) -> float:
    word = secrets.token_hex(16)
    given = json.dumps({"program": program, "tests": list(tests), "word": word})
    outcome = run_program({"main.py": HARNESS, "harness.json": given}, stdin=stdin, limits=limits, unsafe=unsafe)
    verdicts = [line.removeprefix(word) for line in outcome.stdout.splitlines() if line.startswith(word)]
    return sum(json.loads(verdicts[0])) / len(tests) if verdicts else 0.0


def _tests(index: int, given: list[str] | str) -> list[str]:
    tests = [given] if isinstance(given, str) else given
    if not isinstance(tests, list | tuple) or not tests or not all(isinstance(test, str) and test.strip() for test in tests):
        raise UserError(
            f"column 'tests' of sample {index}: expected Python statements, as text or a list of texts, got {given!r:.80}"
        )
    return list(tests)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
