"""Which cluster a run joins when it is not told one."""

import json
import os
import stat
import threading
from contextlib import closing, suppress
from socket import create_server
from types import SimpleNamespace

import pytest
import ray
from ray._common.utils import get_ray_address_file

from rayrlhf.actors.connection import _give_job_time, ambient_address, cluster_file, connected, make_token_private
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


def test_a_cluster_that_is_gone_is_not_joined(tmp_path, port):
    note = tmp_path / "note"
    note.write_text(f"127.0.0.1:{port}\n")
    assert ambient_address(note) == "local"


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


def test_rays_folder_is_found_as_ray_finds_it(monkeypatch):
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    assert str(cluster_file()) == get_ray_address_file(None)
    monkeypatch.setenv("TMPDIR", "/somewhere")
    assert str(cluster_file()) == get_ray_address_file(None)
    monkeypatch.setenv("RAY_TMPDIR", "/elsewhere")
    assert str(cluster_file()) == get_ray_address_file(None)


def test_a_job_gets_time_to_end_from_its_supervisor_or_says_that_it_has_none(monkeypatch, capsys):
    def call(function, *arguments):
        changed.append(arguments)
        function(None, *arguments)

    def actor(name, namespace):
        if name != "_ray_internal_job_actor_mine":
            raise ValueError("no such actor")
        return SimpleNamespace(__ray_call__=SimpleNamespace(remote=call))

    changed = []
    monkeypatch.setattr(ray, "get_actor", actor)
    monkeypatch.setattr(ray, "get", lambda found, timeout: found)
    monkeypatch.setattr(os, "environ", {"HOME": "/"})
    _give_job_time()
    assert changed == [], "no job"
    os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps({"metadata": {"job_submission_id": "mine"}})
    _give_job_time()
    assert changed == [("RAY_JOB_STOP_WAIT_TIME_S", 600)]
    assert os.environ["RAY_JOB_STOP_WAIT_TIME_S"] == "600"
    _give_job_time()
    assert len(changed) == 1, "its own time is kept"
    del os.environ["RAY_JOB_STOP_WAIT_TIME_S"]
    for config in ({"metadata": {"job_submission_id": "other"}}, {}, []):
        os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps(config)
        _give_job_time()
        assert "`ray job stop` kills it 3 s after the signal" in capsys.readouterr().err
