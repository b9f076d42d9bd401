"""`code`: tests of the Python program in a response, run in the sandbox.

The dataset's columns select the kind of task. `expected_output`: the program reads `stdin` and its output is compared outside
of the sandbox. `tests`: Python statements that run after the program with its names, one by one; a statement that raises has
failed. They run in another process than the program (`rayrlhf.rewards.verdict`), which passes their calls on to the program, so
it can neither change nor forge the verdict.

A program that is wrong, too slow or over a limit has reward 0. A failure of the sandbox itself is an error and never a reward.
"""

import json
import os
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from rayrlhf.errors import UserError
from rayrlhf.rewards.formats import Where, check_where, last_block
from rayrlhf.rewards.sandbox import Limits, SandboxError, Unsafe, run_program

_JUDGE = {"main.py": "verdict.py", "remote_objects.py": "remote_objects.py"}
"""File in the sandbox -> module here: the judge of a task with tests."""


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
    """Return 1.0 for each response whose program passes everything, else 0.0; None without a task.

    Args:
        responses: [B].
        tests: [B], column: Python statements, one text or a list of texts that are run one by one.
        stdin: [B], column: standard input of the program.
        expected_output: [B], column: expected output; space at the ends of lines and of the whole is ignored.
        where: `fenced` takes the last block of three backticks, `whole` the response as it is.
        partial: reward the share of passed tests instead of all or nothing.
        cpu_seconds: CPU time limit of each process.
        wall_seconds: wall time limit of the program.
        memory_mib: memory limit of each process, in MiB.
        processes: maximum number of processes and threads.
        concurrency: number of programs run at a time; the number of cores of this process when not given.
        unsafe: if programs cannot be contained, `refuse`, or `warn` and run with resource limits alone.

    Raises:
        UserError: an argument or a column is invalid, or programs cannot be contained here and `unsafe` is `refuse`.
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
            text or "",
            None if own is None else _tests(index, own),
            expected,
        )
        for index, (response, own, text, expected) in enumerate(columns)
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
    """Run one program against its tests, its expected output, or both.

    See `code` for arguments and errors.
    """
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
    files = {"task.json": json.dumps({"program": program, "tests": list(tests), "word": word})}
    files |= {name: Path(__file__).with_name(source).read_text() for name, source in _JUDGE.items()}
    outcome = run_program(files, stdin=stdin, limits=replace(limits, processes=limits.processes + 1), unsafe=unsafe)
    verdict = outcome.stdout.removeprefix(word)
    # Without the word, of another length or with other characters: the judge was stopped.
    whole = outcome.stdout.startswith(word) and len(verdict) == len(tests) and set(verdict) <= set("01")
    return verdict.count("1") / len(tests) if whole else 0.0


def _tests(index: int, column: list[str] | str) -> list[str]:
    tests = [column] if isinstance(column, str) else column
    if not isinstance(tests, list | tuple) or not tests or not all(isinstance(test, str) and test.strip() for test in tests):
        raise UserError(
            f"column 'tests' of sample {index}: expected Python statements, as text or a list of texts, got {column!r:.80}"
        )
    return list(tests)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
