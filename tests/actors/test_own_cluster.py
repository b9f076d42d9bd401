"""A cluster that a run starts for itself: the file of a killed one is no obstacle, and others join it only by its address."""

import os
import subprocess
import sys
from contextlib import closing
from socket import create_server

import psutil
import pytest
import ray

from rayrlhf.actors.connection import ambient_address, cluster_file, connected


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    """One started next to the file of a killed cluster."""
    note = tmp_path_factory.mktemp("killed") / "note"
    with closing(create_server(("127.0.0.1", 0))) as server:
        note.write_text(f"127.0.0.1:{server.getsockname()[1]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayrlhf.actors.connection.ambient_address", lambda: ambient_address(note))
        patch.delenv("RAY_ADDRESS", raising=False)
        with connected(None):
            yield
        assert not ray.is_initialized()


def test_the_note_of_a_killed_cluster_costs_no_minutes():
    assert len(ray.nodes()) == 1
    children = psutil.Process().children(recursive=True)
    assert children
    assert all(os.getsid(child.pid) != os.getsid(0) for child in children), "signals to the group end the driver only"


def test_a_cluster_that_answers_is_joined(tmp_path):
    note = tmp_path / "note"
    note.write_text(ray.get_runtime_context().gcs_address)
    assert ambient_address(note) == note.read_text()


def test_a_run_does_not_join_the_cluster_of_another_run():
    assert not cluster_file().exists()
    assert ambient_address() == "local"


def test_a_cluster_of_this_machine_is_joined_and_outlives_the_run():
    code = (
        "import ray; from rayrlhf.actors.connection import connected\n"
        "with connected(None): print(ray.get_runtime_context().gcs_address)"
    )
    address = ray.get_runtime_context().gcs_address
    environment = os.environ | {"RAY_ADDRESS": address}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True, timeout=120)
    assert run.stdout.split()[-1] == address
    assert len(ray.nodes()) == 1
