"""Programs judged by their output and by tests."""

import pytest

from rayrlhf.errors import UserError
from rayrlhf.rewards import programs, sandbox
from rayrlhf.rewards.programs import code
from rayrlhf.rewards.sandbox import SandboxError

LACKING = sandbox.missing()
contained = pytest.mark.skipif(bool(LACKING), reason=f"programs cannot be contained here: {LACKING}")

DOUBLE = "Here:\n```python\ndef double(n):\n    return 2 * n\n```\nThat is it."
TESTS = ["assert double(2) == 4", "assert double('ab') == 'abab'", "assert double(3) == 7"]


@contained
def test_output_is_compared_and_tests_are_run_one_by_one():
    responses = ["```python\nprint(int(input()) + 1)  \n```"] * 3 + [DOUBLE] * 2
    rewards = code(
        responses,
        tests=[None, None, None, TESTS[:2], TESTS],
        stdin=["1\n", "2\n", "no number", None, None],
        expected_output=["2", "2", "2", None, None],
    )
    assert rewards == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert code([DOUBLE], tests=[TESTS], partial=True) == [pytest.approx(2 / 3)]


@contained
@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "print('[true]'); raise SystemExit(0)",
        "while True: pass",
        "def double(n:",
        "import os; os.kill(os.getpid(), 9)",
        "x = 'a' * 2**34",
        "",
    ],
)
def test_a_program_that_leaves_before_its_tests_passes_none(program):
    assert code([f"```\n{program}\n```"], tests=[["assert True"]], cpu_seconds=1) == [0.0]


def test_a_row_without_a_task_has_no_reward_and_a_response_without_a_block_has_zero():
    assert code(["print(1)", "print(1)"], tests=[None, "assert True"], expected_output=None) == [None, 0.0]


def test_mistakes_are_one_clear_line_and_a_sandbox_that_fails_is_no_reward(monkeypatch):
    with pytest.raises(UserError, match="needs a column 'tests' or 'expected_output'"):
        code(["x"])
    with pytest.raises(UserError, match=r"column 'tests' of sample 1: expected Python statements.* got 3"):
        code(["x", "x"], tests=["assert 1", 3])  # type: ignore[list-item]
    with pytest.raises(UserError, match="unsafe 'yes': expected 'refuse' or 'warn'"):
        code(["x"], tests=["assert 1"], unsafe="yes")  # type: ignore[arg-type]

    def broken(*_: object, **__: object) -> None:
        raise SandboxError("no memory for a process")

    monkeypatch.setattr(programs, "run_program", broken)
    with pytest.raises(UserError, match="the sandbox could not run a program: no memory"):
        code([DOUBLE], tests=[TESTS])
