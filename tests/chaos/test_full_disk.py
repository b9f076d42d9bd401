"""A disk that fills up in a real run or while it closes: one line, nothing torn, and the same command goes on with room.

The run folder is a small file system in memory, mounted in a namespace of the test alone.
"""

import subprocess
import sys

import pytest

from rayrlhf.config.loading.load import dump_config
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.checkpoint import list_checkpoints
from rayrlhf.storage.manifest import verify
from tests.chaos.arena import ROOT
from tests.ppo.runs import run_config
from tests.tuning.runs import sft_config

SCRIPT = """
mount -t tmpfs -o size=200m tmpfs {runs} || exit 99
fallocate -l $((200 * 1024 * 1024 - {left})) {runs}/.ballast 2> /dev/null || exit 98
{first}
echo "exit code $?"
rm {runs}/.ballast
{command}
echo "exit code $?"
cp -r {runs}/. {copy}
"""
CHECK = "from rayrlhf.observe import host_limits; host_limits.FREE_BYTES = -1e12; from rayrlhf.cli import main; main()"
"""The command without the check that would refuse so little space."""


def mounted(folder, config, kind, left):
    """Run the command with `left` free bytes, then with room; returns its output, and a copy of the run folder."""
    runs, copy, path = folder / "runs", folder / "copy", folder / "run.yaml"
    runs.mkdir()
    path.write_text(dump_config(config))
    command = f"{sys.executable} -m rayrlhf.cli {kind} {path} 2>&1"
    first = f"{sys.executable} -c '{CHECK}' {kind} {path} 2>&1"
    script = SCRIPT.format(runs=runs, left=left, first=first, command=command, copy=copy)
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script], capture_output=True, text=True, timeout=500, check=False, cwd=ROOT
    )
    if done.returncode in (1, 98, 99) and "exit code" not in done.stdout:
        pytest.skip(f"no file system can be mounted here: {done.stderr[:200]}")
    first, _, second = done.stdout.partition("exit code ")
    return first, second, copy / config.run.folder.name


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("left", "steps"),
    [
        pytest.param(3_000_000, 3, id="in a checkpoint"),
        pytest.param(40_000, 3, id="in the first metrics"),
        pytest.param(3_380_000, 1, id="while the run closes"),  # a checkpoint has 3.05 MB, the export 0.5
    ],
)
def test_a_ppo_run_on_a_full_disk_ends_in_one_line_and_goes_on_with_room(tmp_path, left, steps):
    settings = ["rollout.backend=transformers", "evaluation.enabled=false", f"run.steps={steps}", "checkpoint.every=1"]
    first, second, copy = mounted(tmp_path, run_config(tmp_path, *settings), "ppo", left)
    assert second.startswith("2\n"), first + second
    assert "Traceback" not in first
    assert "No space left on device" in first.strip().splitlines()[-1]
    assert second.rstrip().endswith("exit code 0"), second
    assert [row["step"] for row in read_metrics(copy) if "lr" in row] == list(range(1, steps + 1))
    assert all(verify(checkpoint.folder) for checkpoint in list_checkpoints(copy / "checkpoints"))
    assert not list(copy.rglob("*.partial"))


@pytest.mark.nightly
@pytest.mark.parametrize("left", [40_000, 1_500_000], ids=["in the first metrics", "in a checkpoint"])
def test_an_sft_run_on_a_full_disk_ends_in_one_line_and_goes_on_with_room(tmp_path, left):
    config = sft_config(tmp_path, "checkpoint.every=1", "evaluation.generations=0", "workers.max_failures=1")
    first, second, copy = mounted(tmp_path, config, "sft", left)
    assert second.startswith("2\n"), first + second
    assert "Traceback" not in first
    assert "No space left on device" in first.strip().splitlines()[-1]
    assert second.rstrip().endswith("exit code 0"), second
    assert len([row for row in read_metrics(copy) if "loss" in row]) == 6
