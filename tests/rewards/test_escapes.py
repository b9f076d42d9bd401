"""Responses that try to pay themselves, to end the run, or to get out of the sandbox: each is one row of a table."""

import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rayrlhf.rewards import sandbox
from rayrlhf.rewards.programs import code
from rayrlhf.rewards.remote_objects import Link
from rayrlhf.rewards.sandbox import WORK, Limits, run_program

LACKING = sandbox.missing()
pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"programs cannot be contained here: {LACKING}")

TESTS = [
    "assert f(2) == 5",
    "assert not f(2) != 5",
    "assert abs(f(2) - 5) < 1e-6",
    "assert abs(5 - f(2)) <= 0",
    "assert f(2) in (5, 6)",
    "assert 4 < f(2) < 6",
    "assert [f(2)] == [5] and {'a': f(2)} == {'a': 5}",
    "assert all(value == 5 for value in [f(2)])",
    "import math\nassert math.isclose(f(2), 5)",
    "import statistics\nassert statistics.mean([f(2), f(2)]) == 5",
    "assert isinstance(f(2), int) and len(str(f(2))) == 1 and sum([f(2)]) == 5",
    "assert sorted(f([2, 1])) == [1, 2]",
    "assert f(lambda value: value) == 5",
    "assert abs(abs(f(2)) - 5) < 1e-6 and not f(2) - 5",
    "assert ((f(2) - 5) ** 2) < 1e-6",
    "assert all(map(lambda value: f(value) == 5, [2, 3]))",
]
YES = """
class Yes:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __sub__(self, other): return 0
    def __abs__(self): return 0
    def __contains__(self, other): return True
    __rsub__ = __add__ = __radd__ = __sub__
    __lt__ = __le__ = __gt__ = __ge__ = __eq__
    def __hash__(self): return 5
    def __len__(self): return 0
def f(x): return Yes()
"""
ANSWER = """
import os
def reply(text):
    while True:
        line = b""
        while not line.endswith(b"\\n"):
            line += os.read(RECEIVE, 1)
        os.write(SEND, text.encode() + b"\\n")
def ask(text):
    while os.read(RECEIVE, 1) != b"\\n": pass
    os.write(SEND, text.encode() + b"\\n")
    reply('["value", 0, []]')
import sys
RECEIVE, SEND = int(sys.argv[1]), int(sys.argv[2])
os.write(SEND, b'["ran"]\\n')
"""
CLOSE = """
class Close:
    def __sub__(self, other): return self
    __rsub__ = __xor__ = __pow__ = __sub__
    def __abs__(self): return 0
    def __bool__(self): return False
    def __float__(self): return 0.0
    def __lt__(self, other): return True
def f(x): return Close()
"""
RUNS = "import sys\nsys.modules['__main__']._passes = lambda *a: True"
PARENT = "import ctypes, os, signal\nlibc = ctypes.CDLL(None)\ndef f(x): return 0\n"
FORGERIES = {
    "json.dumps = str": "import json\njson.dumps = str",
    "output that leaves room for half a verdict": "import sys\nsys.stdout.write('x' * (2**20 - 37)); sys.stdout.flush()",
    "verdict of texts": "import json\njson.dumps = lambda x: '[\"a\"]'",
    "verdict of 100,000 brackets": "import json\njson.dumps = lambda x: '[' * 100000",
    "[NaN]": "import json\njson.dumps = lambda x: '[NaN]'",
    "[1000000]": "import json\njson.dumps = lambda x: '[1000000]'",
    "[true] for every test": f"import json\njson.dumps = lambda x: '{[True] * len(TESTS)}'",
    "exec does nothing": "import builtins\nbuiltins.exec = lambda *a: None\nbuiltins.compile = lambda *a: None",
    "no AssertionError": "import builtins\nbuiltins.AssertionError = type('E', (), {})\ndef f(x): return 0",
    "equals everything": YES,
    "integer that equals everything": "class Yes(int):\n  __eq__ = __lt__ = __gt__ = lambda s, o: True\n"
    "def f(x): return Yes(0)",
    "text that equals everything": "class Yes(str):\n  __eq__ = lambda s, o: True\ndef f(x): return Yes('')",
    "list that equals everything": "class Yes(list):\n  __eq__ = lambda s, o: True\ndef f(x): return Yes()",
    "class that equals everything": "class M(type):\n  __eq__ = lambda s, o: True\n__hash__ = None\n"
    "def f(x): return M('A', (), {})",
    "exception that equals everything": "class M(type):\n  __eq__ = lambda s, o: True\n  __hash__ = lambda s: 5\n"
    "def f(x): return M('A', (Exception,), {})",
    "claims to be an integer": YES.replace("class Yes:", "class Yes:\n    __class__ = int"),
    "unittest.mock.ANY": "from unittest.mock import ANY\ndef f(x): return ANY",
    "MagicMock": "from unittest.mock import MagicMock\nf = MagicMock(return_value=MagicMock())",
    "own abs, all, sorted, len, isinstance, sum, str": "def f(x): return 0\n"
    "abs = sum = len = lambda *a: 0\nall = isinstance = lambda *a: True\nsorted = lambda *a: [1, 2]\nstr = lambda *a: '5'",
    "abs of builtins": "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.all = lambda x: True\ndef f(x): return 0",
    "own math": "class math:\n  isclose = lambda *a: True\ndef f(x): return 0",
    "modules in the working folder": "for name in ('math', 'statistics', 'numbers', 'sitecustomize'):\n"
    "  open(name + '.py', 'w').write('isclose = lambda *a: True\\nmean = lambda x: 5')\ndef f(x): return 0",
    "tracer": "import sys\nsys.settrace(lambda *a: None)\ndef f(x):\n  sys._getframe(1).f_trace = None\n  return 0",
    "frames": "import sys\ndef f(x):\n  frame = sys._getframe()\n  while frame:\n"
    "    frame.f_globals['_passes'] = lambda *a: True\n"
    "    frame.f_locals['verdict'] = '1' * 99\n    frame = frame.f_back\n  return 0",
    "objects of the collector": "import gc\ndef f(x):\n"
    "  return next((o['tests'] for o in gc.get_objects() if type(o) is dict and 'tests' in o), 0)",
    "files of the judge": "import os\ndef f(x):\n"
    "  return [open(n).read() for n in os.listdir('.') if n == 'task.json' or 'assert' in n]",
    "verdict on every file": "import os\nfor n in range(1, 64):\n  try: os.write(n, b'1' * 13)\n  except OSError: pass\n"
    "def f(x): return 0",
    "verdict at exit": "import atexit, os\natexit.register(lambda: os.write(1, b'1' * 13))\nraise SystemExit(0)",
    "exit": "import os\nos._exit(0)",
    "answers true to every request": ANSWER + """reply('["value", true, []]')""",
    "answers with an import of exec": ANSWER + """reply('["value", ["list", [true, ["import", "builtins", "exec"]]], []]')""",
    "answers with ANY": ANSWER + """reply('["value", ["list", [true, ["import", "unittest.mock", "ANY"]]], []]')""",
    "answers with the judge's own objects": ANSWER + """reply('["value", ["list", [true, ["yours", -1]]], []]')""",
    "answers with the judge's module": ANSWER + """reply('["value", ["list", [true, ["import", "__main__", "judge"]]], []]')""",
    "answers with 100,000 brackets": ANSWER + "reply('[' * 100000)",
    "answers without end": ANSWER + "while True: os.write(SEND, b'x' * 2**16)",
    "answers with text for numbers": ANSWER + """reply('["error", [["a", []]], "x"]')""",
    "asks for a test's globals": "def f(x):\n  try: x.__globals__['_passes'] = lambda *a: True\n  except AttributeError: pass\n"
    "  return 0",
    "asks by its own message for a test's globals": ANSWER + """reply('["ask", ["get", ["yours", 0], "__globals__"]]')""",
    "traces the judge": PARENT + "libc.ptrace(16, os.getppid(), 0, 0)",
    "reads the judge's memory": PARENT + "assert libc.process_vm_readv(os.getppid(), 0, 0, 0, 0, 0) == 0",
    "calls exec of the judge": ANSWER + "import json\nask(json.dumps(['ask', ['call', ['import', 'builtins', 'exec'], "
    f"['list', [{RUNS!r}]], ['dict', []]]]))",
    "close to everything": CLOSE,
    "ends every map": "def f(x): raise StopIteration",
    "takes the judge's files": PARENT + "n = libc.syscall(438, os.pidfd_open(os.getppid()), 4, 0)\nos.write(n, b'1' * 13)",
    "kills the judge": PARENT + "os.kill(os.getppid(), 9)",
    "kills all": PARENT + "os.kill(-1, 9)",
    "interrupts process 1": PARENT + "os.kill(1, signal.SIGINT)",
    "ends process 1's time": PARENT + "os.kill(1, signal.SIGALRM)",
    "takes away the judge's memory": PARENT + "import resource\n"
    "resource.prlimit(os.getppid(), resource.RLIMIT_AS, (4096, 4096))",
    "two processes that reply": "import os\nos.fork()\ndef f(x): return 0",
    "deep recursion": "def f(x):\n  r = []\n  for _ in range(10**5): r = [r]\n  return r",
    "surrogates": "def f(x): return '\\ud800' * 9",
    "null byte": "x = 1\0",
    "import hook": "import sys\nclass Hook:\n  def find_spec(self, name, *_):\n    import types\n"
    "    sys.modules[name] = types.SimpleNamespace(isclose=lambda *a: True, mean=lambda x: 5)\n"
    "sys.meta_path.insert(0, Hook())\nsys.modules.pop('math', None)\ndef f(x): return 0",
    "modules of the judge": "import sys\nsys.modules['math'] = sys.modules['statistics'] = type('M', (), "
    "{'isclose': lambda *a: True, 'mean': lambda x: 5})\ndef f(x): return 0",
    "rewrites the judge's files": "import os\nfor n in os.listdir('.'):\n"
    "  try: open(n, 'w').write('def judge(): return \"1\" * 13')\n"
    "  except OSError: pass\ndef f(x): return 0",
    "links over the judge's files": "import os\nfor n in ('task.json', 'verdict.py', 'main.py', 'remote_objects.py'):\n"
    "  try: os.path.exists(n) and os.unlink(n); os.symlink('/dev/null', n)\n  except OSError: pass\ndef f(x): return 0",
    "closes every file": "import os\nos.closerange(0, 64)\ndef f(x): return 0",
    "a later process that replies": "import os, sys, time\nif os.fork() == 0:\n  time.sleep(0.2)\n"
    "  os.write(int(sys.argv[2]), b'[\"value\", true, []]\\n' * 99)\n  os._exit(0)\ndef f(x):\n  time.sleep(0.4)\n  return 0",
    "threads that reply": "import os, sys, threading\ndef spam():\n  for _ in range(999):\n"
    "    os.write(int(sys.argv[2]), b'[\"value\", true, []]\\n')\n"
    "for _ in range(4): threading.Thread(target=spam, daemon=True).start()\ndef f(x): return 0",
    "more threads than it may have": "import threading, time\nfor _ in range(99):\n"
    "  threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\ndef f(x): return 5",
    "reads the tests from its input": "import sys\nanswers = sys.stdin.read()\n"
    "def f(x): return 5 if 'assert' in answers else 0",
    "number without end": "def f(x): return 10 ** 10 ** 6",
    "iterator without end": "import itertools\ndef f(x): return itertools.repeat(5)",
    "not a number": "def f(x): return float('nan')",
    "truth that raises": "class No:\n  def __bool__(self): raise SystemExit(0)\n"
    "  __eq__ = lambda s, o: s\ndef f(x): return No()",
    "exit in a test": "import sys\ndef f(x): sys.exit(0)",
    "interrupt in a test": "def f(x): raise KeyboardInterrupt",
    "the judge's exception": "class Closed(BaseException): pass\ndef f(x): raise Closed",
    "pickled command": "class P:\n  def __reduce__(self): return eval, ('1',)\ndef f(x): return P()",
    "attributes that lie": "class L:\n  def __getattribute__(self, name): return lambda *a: True\ndef f(x): return L()",
    "environment of the judge": "import os\nos.environ['PYTHONOPTIMIZE'] = '2'\nos.environ['PYTHONPATH'] = '.'\n"
    "def f(x): return 0",
    "no assertions by the debug flag": "import builtins\ntry: builtins.__dict__['__debug__'] = False\nexcept Exception: pass\n"
    "def f(x): return 0",
}


@pytest.fixture(scope="module")
def rewards() -> dict[str, float | None]:
    right = "def f(x):\n  return sorted(x) if isinstance(x, list) else 5"
    programs = [right, *FORGERIES.values()]
    paid = code(programs, tests=[TESTS] * len(programs), where="whole", partial=True, cpu_seconds=2, wall_seconds=60.0)
    return dict(zip(["right", *FORGERIES], paid, strict=True))


def test_a_right_program_passes_the_tests_that_the_forgeries_must_fail(rewards):
    assert rewards["right"] == 1.0


def test_there_are_forty_forgeries_and_thirty_ways_out():
    assert len(FORGERIES) >= 40
    assert len(PROBES) >= 30


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_verdict_pays_nothing_and_ends_no_run(name, rewards):
    assert rewards[name] == 0.0


BOX = "class Box:\n  value = 0\n  def __enter__(self): return self\n  def __exit__(self, kind, *rest): return {}"
TYPED = f"open('stdin', 'w').write({(RUNS.replace(chr(10), ';') + chr(10) + 'c' + chr(10))!r})\n"
SINGLE = {
    "its context manager ends the assertion": (BOX.format(True), ["with Box() as box:\n  assert box.value == 5"], 0.0),
    "its context manager ends any error": (BOX.format(True), ["with Box() as box:\n  assert box < 5"], 0.0),
    "a context manager that may end an error": (BOX.format("kind is ValueError"), ["with Box():\n  raise ValueError"], 1.0),
    "the debugger as a result": (TYPED + "def f(x): return breakpoint", ["f(2)()", "assert False"], 0.0),
    "exec as a result": ("def f(x): return exec", [f"f(2)({RUNS!r})", "assert False"], 0.0),
    "a difference by a method": (
        CLOSE.replace("def f", "    def sum(self): return 0\ndef f"),
        ["assert (f(2) - 5).sum() < 1"],
        0.0,
    ),
    "a product with a value": (
        "class V:\n  def __init__(self, x): self.x = x\n  def __mul__(self, n): return V(self.x * n)",
        ["assert (V(2) * 3).x == 6"],
        1.0,
    ),
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_program_is_paid_for_what_it_does(name):
    program, tests, paid = SINGLE[name]
    assert code([program], tests=[tests], where="whole", cpu_seconds=2) == [paid]


def test_a_program_reaches_only_what_it_was_given():
    link = Link(io.BytesIO(), io.BytesIO(), open_names=False)
    for request in [("call", exec, ["1"], {}), ("get", os, "system"), ("set", os, "x", 1), ("op", "bool", [1]), ("name", "x")]:
        with pytest.raises(TypeError, match="not an object that the program was given"):
            link._run(*request)
    given = len
    assert link.pack(lambda: given) == ["mine", 0]
    assert link._run("call", link.unpack(["yours", 0]), [], {}) == (len, [])


def test_a_program_that_stops_its_judge_is_out_of_time():
    stopping = PARENT + "os.kill(os.getppid(), signal.SIGSTOP)"
    assert code([stopping], tests=[["assert True"]], where="whole", wall_seconds=1.0) == [0.0]


PROBES = {
    "note in the session keyring": "call(248, b'user', b'note', b'x', 1, -3)",
    "note in the user keyring": "call(248, b'user', b'note', b'x', 1, -4)",
    "key of the session": "call(249, b'user', b'secret', None, -3)",
    "id of the session keyring": "call(250, 0, -3, 0)",
    "list of the session keyring": "call(250, 11, -3, None, 0)",
    "System V shared memory": "call(29, 0, 4096, 0o1600)",
    "System V semaphores": "call(64, 0, 32000, 0o1600)",
    "System V messages": "call(68, 0, 0o1600)",
    "POSIX message queue": "call(240, b'/q', 0o102, 0o600, None)",
    "trace of the parent": "call(101, 16, os.getppid(), 0, 0)",
    "memory of process 1": "call(310, 1, None, 0, None, 0, 0)",
    "files of process 1": "call(438, os.pidfd_open(1), 0, 0)",
    "performance counters": "call(298, None, 0, -1, -1, 0)",
    "programs in the kernel": "call(321, 5, None, 0)",
    "faults of the kernel": "call(323, 0)",
    "ring of calls": "call(425, 8, None)",
    "namespace of users": "call(272, 0x10000000)",
    "another namespace": "call(308, 0, 0)",
    "mount": "call(165, b'none', b'/tmp', b'tmpfs', 0, None)",
    "mount by a tree": "call(428, -100, b'/', 1)",
    "unmount": "call(166, b'/tmp', 2)",
    "another root": "call(161, b'/tmp')",
    "writable mounts": "call(442, -100, b'/', 0x8000, None, 0)",
    "file by its handle": "call(304, 0, None, 0)",
    "kernel messages": "call(103, 3, None, 0)",
    "another user": "call(105, 0)",
    "host name": "call(170, b'x', 1)",
    "clock": "call(227, 0, b'0' * 16)",
    "device": f"os.mknod('{WORK}/d', 0o20600, os.makedev(1, 1))",
    "processes in /proc": "os.listdir('/proc/1')",
    "shared memory of the machine": "open('/dev/shm/x', 'w')",
    "files of the project": f"open({str(Path(__file__).resolve())!r})",
    "users": "open('/etc/passwd')",
    "listening ports": "__import__('socket').create_connection(('127.0.0.1', 6379), 1)",
    "locked memory": "call(151, 1) == 0 and call(149, b'x' * 2**20, 2**20)",
}
X86_64 = sandbox.os.uname().machine == "x86_64"


@pytest.fixture(scope="module")
def probes() -> dict[str, bool]:
    program = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        def call(number, *given):
            made = libc.syscall(number, *[ctypes.c_long(g) if isinstance(g, int) else g for g in given])
            if made < 0:
                raise OSError(ctypes.get_errno(), "refused")
        for index, probe in enumerate(PROBES):
            try:
                eval(probe)
                print(index)
            except OSError:
                pass
        print("end")
    """
    source = textwrap.dedent(program).replace("PROBES", repr(list(PROBES.values())))
    outcome = run_program({"main.py": source}, limits=Limits(wall_seconds=60.0))
    assert outcome.stdout.endswith("end\n"), outcome
    reached = outcome.stdout.split()
    return {name: str(index) in reached for index, name in enumerate(PROBES)}


@pytest.mark.skipif(not X86_64, reason="the numbers of the calls are those of x86_64")
@pytest.mark.parametrize("name", PROBES)
def test_a_way_out_of_the_sandbox_is_closed(name, probes):
    assert not probes[name]


def test_an_environment_in_a_project_s_folder_does_not_show_the_project(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--symlinks", tmp_path], check=True)
    (tmp_path / "answers.txt").write_text("secret")
    (tmp_path / "lib" / "answers.py").write_text("secret")
    root = Path(sandbox.__file__).parents[2]
    script = f"""
        import sys
        sys.path.insert(0, {str(root)!r})
        from rayrlhf.rewards.sandbox import run_program
        paths = {[str(tmp_path / "answers.txt"), str(tmp_path / "lib" / "answers.py")]}
        program = f"import os, sys; print(sys.prefix, [os.path.exists(path) for path in {{paths}}])"
        print(run_program({{"main.py": program}}).stdout)
    """
    python = tmp_path / "bin" / "python"
    done = subprocess.run([python, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[0] == f"{tmp_path} [False, False]", done.stderr


def test_a_program_that_ends_its_warden_has_ended_itself(monkeypatch):
    tries = []

    def stopped(*_: object, **__: object) -> None:
        tries.append(1)
        raise sandbox._StoppedError("the warden ended while the program ran")

    monkeypatch.setattr(sandbox, "_run", stopped)
    monkeypatch.setattr(sandbox, "PAUSE_SECONDS", 0.0)
    assert run_program({"main.py": ""}).status == -9
    assert len(tries) == 3
