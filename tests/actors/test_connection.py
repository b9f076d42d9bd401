"""Which cluster a run joins when it is not told one."""

import os
import stat
import subprocess
import sys
import threading
from contextlib import closing, suppress
from socket import create_server

import psutil
import pytest
import ray
from ray._common.utils import get_ray_address_file

from rayrlhf.actors.connection import ambient_address, cluster_file, connected, make_token_private
from rayrlhf.errors import UserError


@pytest.fixture
def port():
    """A port on which nobody listens."""
    with closing(create_server(("127.0.0.1", 0))) as server:
        return server.getsockname()[1]


def test_without_a_note_a_new_cluster_is_started(tmp_path):
    assert ambient_address(tmp_path / "none") == "local"


@pytest.mark.parametrize("text", ["", "nonsense", "127.0.0.1", "127.0.0.1:port", "[::1]:", "\x00:1"])
def test_a_note_that_says_nothing_is_no_cluster(tmp_path, text):
    (tmp_path / "note").write_text(text)
    assert ambient_address(tmp_path / "note") == "local"


def test_a_cluster_that_answers_is_joined_and_one_that_is_gone_is_not(tmp_path, port):
    note = tmp_path / "note"
    note.write_text(f"127.0.0.1:{port}\n")
    assert ambient_address(note) == "local"
    with connected("local"):
        note.write_text(ray.get_runtime_context().gcs_address)
        assert ambient_address(note) == note.read_text()


@pytest.mark.parametrize("answer", [b"", b"-ERR unknown command 'PRI'\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_note_with_the_port_of_another_service_is_no_cluster(tmp_path, answer, monkeypatch):
    def serve():
        with suppress(OSError):
            while True:
                others.append(server.accept()[0])
                others[-1].sendall(answer)

    others = []
    monkeypatch.setattr("rayrlhf.actors.connection.ANSWER_SECONDS", 0.5)
    with closing(create_server(("127.0.0.1", 0))) as server:
        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "note").write_text(address)
        assert ambient_address(tmp_path / "note") == "local"
        with pytest.raises(UserError, match=f"{address}: no Ray cluster responds there"), connected(address):
            pass


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_rays_token_is_readable_by_its_user_alone(tmp_path, monkeypatch, mask):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    before = os.umask(mask)
    try:
        make_token_private()
    finally:
        os.umask(before)
    token = tmp_path / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) == 64
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]
    token.chmod(0o644)
    text = token.read_text()
    make_token_private()
    assert (stat.S_IMODE(token.stat().st_mode), token.read_text()) == (0o600, text)


def test_the_note_of_a_killed_cluster_costs_no_minutes(tmp_path, port, monkeypatch):
    note = tmp_path / "note"
    note.write_text(f"127.0.0.1:{port}")
    monkeypatch.setattr("rayrlhf.actors.connection.ambient_address", lambda: ambient_address(note))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with connected(None):
        assert len(ray.nodes()) == 1
        children = psutil.Process().children(recursive=True)
        assert children
        assert all(os.getsid(child.pid) != os.getsid(0) for child in children), "signals to the group end the driver only"
    assert not ray.is_initialized()


def test_a_run_does_not_join_the_cluster_of_another_run(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with connected(None):
        assert not cluster_file().exists()
        assert ambient_address() == "local"


def test_rays_folder_is_found_as_ray_finds_it(monkeypatch):
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    assert str(cluster_file()) == get_ray_address_file(None)
    monkeypatch.setenv("TMPDIR", "/somewhere")
    assert str(cluster_file()) == get_ray_address_file(None)
    monkeypatch.setenv("RAY_TMPDIR", "/elsewhere")
    assert str(cluster_file()) == get_ray_address_file(None)


def test_a_cluster_of_this_machine_is_joined_and_outlives_the_run():
    code = (
        "import ray; from rayrlhf.actors.connection import connected\n"
        "with connected(None): print(ray.get_runtime_context().gcs_address)"
    )
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        address = ray.get_runtime_context().gcs_address
        environment = os.environ | {"RAY_ADDRESS": address}
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True, timeout=120
        )
        assert run.stdout.split()[-1] == address
        assert len(ray.nodes()) == 1
    finally:
        ray.shutdown()
