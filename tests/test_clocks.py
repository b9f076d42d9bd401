"""Durations and deadlines are read from monotonic clocks, so that a system clock that is set back delays nothing."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "rayrlhf"
WALL_CLOCKS = {("time", "time"), ("datetime", "now"), ("datetime", "utcnow"), ("datetime", "today")}
SHOWN = {
    "actors/waiting.py": "when a call began, in an error",
    "engines/rollout/vllm_lora.py": "age of a leftover folder; one that seems new is kept",
    "observe/phases.py": "place of a span in the trace",
    "tools/debug/debug_page.py": "age of the newest facts of a run",
    "tools/report/run_view.py": "age of a file; one that seems new is a running run",
}
"""Modules that compute with a time of day, and what for: nothing waits for it."""


def calls(tree):
    """Calls of wall clocks, and those among them whose value is computed with."""
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute):
                owner = child.func.value
                name = getattr(owner, "id", getattr(owner, "attr", ""))
                if (name, child.func.attr) in WALL_CLOCKS:
                    yield isinstance(node, ast.BinOp | ast.Compare | ast.AugAssign)


def test_nothing_that_waits_or_measures_reads_the_time_of_day():
    computed = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(calls(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert computed == set(SHOWN)
