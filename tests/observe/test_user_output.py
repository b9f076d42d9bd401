"""Output of user code in an actor is told from that of libraries, and reaches the run folder line by line."""

import json
import logging
import pprint
import subprocess
import sys
import threading

from rayrlhf.observe.user_output import MAX_LINES, OutputFile, UserOutput

SCRIPT = """
import json, sys
from pathlib import Path
from rayrlhf.observe.user_output import UserOutput
from rayrlhf.plugins import import_file

output = UserOutput()
output.capture()
output.capture()
import_file(Path(sys.argv[1]), "reward function").score()
lines = output.take(last=True)
sys.__stdout__.write("\\n" + json.dumps([line[9:] for line in lines]) + "\\n")
"""
PLUGIN = """
import logging
import pprint
import threading

def score():
    print("printed", 1)
    pprint.pprint({"by": "a library"})
    logging.getLogger(__name__).debug("not shown")
    logging.getLogger("mine").info("logged %d", 2)
    thread = threading.Thread(target=lambda: print("from a thread"))
    thread.start(), thread.join()
    print("10 %", end="\\r")
    print("20 %")
    print("begun", end="")
"""


def test_what_a_plugin_prints_and_logs_is_found_in_an_actors_process(tmp_path):
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN)
    # Run by -c, the script is in no file, so that only the plugin is a user's.
    found = subprocess.run([sys.executable, "-c", SCRIPT, str(plugin)], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(found.stdout.splitlines()[-1]) == [
        "printed 1",
        "{'by': 'a library'}",
        "INFO mine: logged 2",
        "from a thread",
        "20 %",
        "begun",
    ]
    assert "printed 1" in found.stdout, "Ray's log keeps it too"


def test_output_of_libraries_is_left_to_rays_logs(monkeypatch):
    output = UserOutput()
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setattr(logging, "lastResort", logging.lastResort)
    output.capture()
    thread = threading.Thread(target=pprint.pprint, args=("no frame of a user",))  # as a library's own thread
    thread.start()
    thread.join()
    assert output.take(last=True) == []
    print("of this file")
    assert [line[9:] for line in output.take()] == ["of this file"]


def test_a_flood_is_cut_and_its_size_told():
    output = UserOutput()
    output.write("line\n" * (MAX_LINES + 5))
    lines = output.take()
    assert len(lines) == MAX_LINES + 1
    assert lines[-1].endswith("... and 5 more lines, which were dropped")
    assert output.take() == []


def test_the_file_names_the_actor_of_each_line(tmp_path):
    file = OutputFile(tmp_path)
    assert file.write("ppo/reward/0", ["10:11:12 a \ud800 line"]) == ["10:11:12 ppo/reward/0: a \ud800 line"]
    file.write("ppo/rollout/1", ["10:11:13 another"])
    assert file.path.read_text() == "10:11:12 ppo/reward/0: a \\ud800 line\n10:11:13 ppo/rollout/1: another\n"
