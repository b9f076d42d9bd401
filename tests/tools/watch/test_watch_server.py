"""The served page: only from this machine, only with its token, only reading."""

from __future__ import annotations

import http.client
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayrlhf.errors import UserError
from rayrlhf.observe.metrics import MetricsSink
from rayrlhf.tools.watch.watch_server import PageCache, RunServer, fingerprint
from tests.tools.report.runs import write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", steps=5)


@pytest.fixture
def server(run: Path) -> Iterator[RunServer]:
    with RunServer(run) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def ask(server: RunServer, path: str, *, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer, answer.read().decode()


def test_the_page_and_its_library_come_with_the_token(server: RunServer):
    answer, page = ask(server, f"/{server.token}/")
    assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-store")
    assert "PPO: first" in page
    answer, library = ask(server, f"/{server.token}/plotly.js")
    assert answer.status == 200
    assert len(library) > 1_000_000


@pytest.mark.parametrize(
    "path", ["/", "/wrong/", "//", "/{token}x/", "/{token}/config.yaml", "/{token}/../config.yaml", "/\xfc/"]
)
def test_other_paths_and_tokens_find_nothing(server: RunServer, path: str):
    answer, content = ask(
        server, path.replace("{token}", server.token).encode("latin-1").decode("latin-1").replace("\xfc", "%FC")
    )
    assert (answer.status, content) == (404, "")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "127.0.0.1.evil.example", ""])
def test_another_host_name_is_refused_even_with_the_token(server: RunServer, host: str):
    answer, content = ask(server, f"/{server.token}/", Host=host)
    assert (answer.status, content) == (403, "")


def test_localhost_is_this_machine_too(server: RunServer):
    assert ask(server, f"/{server.token}/", Host=f"localhost:{server.server_port}")[0].status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_but_reading_is_answered(server: RunServer, method: str):
    assert ask(server, f"/{server.token}/", method=method)[0].status == 501


def test_a_head_request_has_no_body(server: RunServer):
    answer, content = ask(server, f"/{server.token}/", method="HEAD")
    assert (answer.status, content) == (200, "")
    assert int(answer.headers["Content-Length"]) > 10_000


def test_only_the_loopback_address_is_bound_and_tokens_are_long_and_new(run: Path):
    with RunServer(run) as one, RunServer(run) as two:
        assert one.server_address[0] == "127.0.0.1"
        assert len(one.token) >= 32
        assert one.token != two.token
        assert one.address == f"http://127.0.0.1:{one.server_port}/{one.token}/"


def test_an_unchanged_page_is_not_sent_again(server: RunServer, run: Path):
    answer, _ = ask(server, f"/{server.token}/")
    tag = answer.headers["ETag"]
    assert ask(server, f"/{server.token}/", If_None_Match=tag)[0].status == 304
    MetricsSink(run).write(6, {"objective/scores": 0.75})
    answer, page = ask(server, f"/{server.token}/", If_None_Match=tag)
    assert answer.status == 200
    assert answer.headers["ETag"] != tag
    assert "after 6 steps" in page


def test_a_folder_that_was_taken_away_is_gone_and_the_server_lives_on(server: RunServer, run: Path):
    shutil.rmtree(run)
    assert ask(server, f"/{server.token}/")[0].status == 410
    assert ask(server, f"/{server.token}/plotly.js")[0].status == 200


def test_a_page_is_made_once_while_nothing_changes_and_again_when_it_is_old(run: Path, monkeypatch: pytest.MonkeyPatch):
    made, now = [], [0.0]
    monkeypatch.setattr(
        "rayrlhf.tools.watch.watch_server.live_page", lambda folder, max_rollouts: made.append(folder) or str(len(made))
    )
    pages = PageCache(run, clock=lambda: now[0])
    assert [pages.page(), pages.page()] == ["1", "1"]
    MetricsSink(run).write(6, {})
    assert pages.page() == "2"
    now[0] = 31.0
    assert pages.page() == "3"


def test_a_missing_folder_has_a_fingerprint_too(tmp_path: Path):
    assert fingerprint(tmp_path / "none") == fingerprint(tmp_path / "none")


def test_a_taken_port_and_a_folder_without_a_run_are_one_line(server: RunServer, run: Path, tmp_path: Path):
    with pytest.raises(UserError, match=f"cannot serve on port {server.server_port}.*--port"):
        RunServer(run, server.server_port)
    with pytest.raises(UserError, match="no such folder"):
        RunServer(tmp_path / "none")
