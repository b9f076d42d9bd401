"""Judge of a program by its tests, run as a script in the sandbox.

It needs only the standard library. Two processes: this one runs the tests and writes the verdict, and the program runs in a
process of its own. The program holds neither the tests, nor the word that marks the verdict, nor the file that receives it, and
cannot trace this process. Names of the program are proxies in the tests (`rayrlhf.rewards.remote_objects`). Built-in names are
the tests' own: the program's definition of such a name counts only if the tests use no other name of it.
"""

import ast
import builtins
import ctypes
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayrlhf.rewards.remote_objects import Closed, Link
else:
    sys.path.append(str(Path(__file__).parent))  # the sandbox's working folder
    from remote_objects import Closed, Link

    sys.path.pop()


class Names(dict[str, Any]):
    """Global names of the tests; unknown ones are the program's."""

    def __init__(self, link: Link, tests: list[str]) -> None:
        super().__init__({"__name__": "__main__", "__builtins__": builtins})
        self._link = link
        self._shadowed = not _free_names(tests)

    def __missing__(self, name: str) -> Any:
        if name.startswith("__") or (hasattr(builtins, name) and not self._shadowed):
            raise KeyError(name)
        known, value = self._link.ask("name", name)
        if known is not True:
            raise KeyError(name)
        return value


def _free_names(tests: list[str]) -> set[str]:
    """Return names that the tests use and neither Python nor they define."""
    used: set[str] = set()
    bound = set(dir(builtins))
    for test in tests:
        try:
            nodes = list(ast.walk(ast.parse(test)))
        except (SyntaxError, ValueError, RecursionError):
            continue
        for node in nodes:
            if isinstance(node, ast.Name):
                (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
            elif isinstance(node, ast.arg):
                bound.add(node.arg)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.ExceptHandler):
                bound.add(node.name or "")
            elif isinstance(node, ast.alias):
                bound.add((node.asname or node.name).split(".")[0])
    return used - bound


def run_program(receive: int, send: int) -> None:
    """Run the program and serve requests until the tests end."""
    link = Link(os.fdopen(receive, "rb"), os.fdopen(send, "wb"), open_names=True)
    (program,) = link.hear()
    link.names.update({"__name__": "__main__", "__builtins__": builtins})
    exec(compile(program, "program", "exec"), link.names)  # noqa: S102
    link.tell("ran")
    while True:
        link.serve(*(link.unpack(part) for part in link.hear()[1]))


def judge() -> str:
    """Return `1` or `0` for each test."""
    task = json.loads(Path("task.json").read_text())
    Path("task.json").unlink()
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: no process of this user can trace this one
    pipes = [*os.pipe(), *os.pipe()]
    if os.fork() == 0:
        for end in (pipes[0], pipes[3]):
            os.set_inheritable(end, True)
        command = [sys.executable, "-I", "-B", "main.py", str(pipes[0]), str(pipes[3])]
        os.execv(sys.executable, command)  # noqa: S606
    os.close(pipes[0])
    os.close(pipes[3])
    link = Link(os.fdopen(pipes[2], "rb"), os.fdopen(pipes[1], "wb"), open_names=False)
    names = Names(link, task["tests"])
    verdict = ""
    try:
        link.tell(task["program"])
        if link.hear() == ["ran"]:
            for test in task["tests"]:
                verdict += str(int(_passes(test, names, link)))
    except Closed:
        pass
    return str(task["word"]) + verdict.ljust(len(task["tests"]), "0")


def _passes(test: str, names: Names, link: Link) -> bool:
    try:
        link.ask("name", "")  # raises when the program has ended
        tree = ast.parse(test)
        blocks = [node for node in ast.walk(tree) if isinstance(node, ast.With)]
        link.suppresses = not any(isinstance(node, ast.Assert) for block in blocks for node in ast.walk(block))
        exec(compile(tree, "test", "exec"), names)  # noqa: S102
    except Closed:
        raise
    except BaseException:  # noqa: BLE001 - a test that raises has failed
        return False
    return True


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_program(int(sys.argv[1]), int(sys.argv[2]))
    _output = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _verdict = judge().encode()
    os.write(_output, _verdict)
    os._exit(0)
