"""Local server of a run's report page, updated while the run is active.

Access needs this machine and the full address: a random token is part of every path, compared in constant time. Requests with
another host name are rejected, so that another web page cannot read the run through the user's browser (DNS rebinding). The
server is read-only.
"""

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from rayrlhf.errors import UserError
from rayrlhf.observe.html.page import chart_library
from rayrlhf.observe.journal import FILE_NAME as JOURNAL
from rayrlhf.observe.metrics import FILE_NAME as METRICS
from rayrlhf.observe.trace import FILE_NAME as TRACE
from rayrlhf.tools.report.run_page import live_page
from rayrlhf.tools.report.run_state import is_locked
from rayrlhf.tools.report.run_view import check_run

LOOPBACK = "127.0.0.1"
WATCHED = (METRICS, "config.yaml", TRACE, JOURNAL, "samples", "evaluation", "answers", "result.json", "export")
"""Files and folders whose change triggers a new page."""
MAX_ROLLOUTS = 200
REFRESH_SECONDS = 30.0
"""Maximum age of a page, so that a stopped run is shown as stopped."""
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}
LIBRARY_HEADERS = HEADERS | {"Cache-Control": "private, max-age=86400"}


class PageCache:
    """Cache of a run's page, rebuilt when its folder changes."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._clock = folder, clock
        self._lock = threading.Lock()
        self._seen: tuple[object, ...] = ()
        self._made = float("-inf")
        self._page = ""

    def page(self) -> str:
        """Return the current page."""
        with self._lock:
            seen, now = fingerprint(self._folder), self._clock()
            if seen != self._seen or now - self._made > REFRESH_SECONDS:
                self._page = live_page(self._folder, max_rollouts=MAX_ROLLOUTS)
                self._seen, self._made = seen, now
            return self._page


class RunServer(ThreadingHTTPServer):
    """Serves one run on the loopback address.

    Attributes:
        token: prefix of every valid path.
        pages: cache of the page.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        """Bind the port; 0 for a free one.

        Raises:
            UserError: the folder holds no run, or the port is taken.
        """
        check_run(folder)
        self.token = secrets.token_urlsafe(24)
        self.pages = PageCache(folder)
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise UserError(
                f"cannot serve on port {port}: {error.strerror}; choose another --port, or 0 for a free one"
            ) from error
        self.hosts = frozenset(f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost"))

    @property
    def address(self) -> str:
        """URL of the page, token included."""
        return f"http://{LOOPBACK}:{self.server_port}/{self.token}/"


class _Handler(BaseHTTPRequestHandler):
    """Handles GET and HEAD for two paths; the base class rejects other methods."""

    server: RunServer
    server_version, sys_version = "rayrlhf", ""
    timeout = 30

    def do_GET(self) -> None:
        """Respond with a body."""
        self._respond(with_body=True)

    def do_HEAD(self) -> None:
        """Respond without a body."""
        self._respond(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing, since paths contain the token."""

    def _respond(self, *, with_body: bool) -> None:
        if self.headers.get("Host", "") not in self.server.hosts:
            self._send(HTTPStatus.FORBIDDEN, b"", "text/plain", HEADERS, with_body)
            return
        _, _, path = self.path.partition("?")[0].partition("/")
        token, _, name = path.partition("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()) or name not in ("", "plotly.js"):
            self._send(HTTPStatus.NOT_FOUND, b"", "text/plain", HEADERS, with_body)
        elif name == "plotly.js":
            self._send(HTTPStatus.OK, chart_library().encode(), "text/javascript", LIBRARY_HEADERS, with_body)
        else:
            self._send_page(with_body)

    def _send_page(self, with_body: bool) -> None:
        try:
            content = self.server.pages.page().encode()
        except UserError:  # the folder was removed meanwhile
            self._send(HTTPStatus.GONE, b"", "text/plain", HEADERS, with_body)
            return
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        headers = HEADERS | {"ETag": tag}
        if self.headers.get("If-None-Match") == tag:
            self._send(HTTPStatus.NOT_MODIFIED, b"", "text/html", headers, with_body=False)
        else:
            self._send(HTTPStatus.OK, content, "text/html", headers, with_body)

    def _send(self, status: HTTPStatus, content: bytes, kind: str, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)


def serve_run(folder: Path, *, port: int = 0, announce: Callable[[str], None]) -> None:
    """Serve a run's page until the user interrupts.

    Args:
        folder: the run folder; only read.
        port: on the loopback address; 0 for a free one.
        announce: called once with the address.

    Raises:
        UserError: the folder holds no run, or the port is taken.
    """
    with RunServer(folder, port) as server:
        announce(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


def fingerprint(folder: Path) -> tuple[object, ...]:
    """Return a fingerprint of the folder: sizes and times of watched files, and the lock."""
    found: list[object] = [is_locked(folder / ".lock")]
    for name in WATCHED:
        try:
            status = (folder / name).stat()
        except OSError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)
