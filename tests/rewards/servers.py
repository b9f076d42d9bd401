"""Real HTTP servers on this machine that answer as a test says."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[int, Any], tuple[int, bytes]]
"""From the number of a request and its body to a status and a body; the status 0 is a connection that is cut."""


class Server:
    """Answers the n-th request as `answer(n, question)` says, and remembers what it was asked."""

    def __init__(self, answer: Answer, read: Callable[[bytes], Any] = json.loads) -> None:
        self.asked: list[Any] = []
        self.paths: list[str] = []
        self.tokens: list[str | None] = []
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.do_POST()

            def do_PUT(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                question = read(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
                with lock:
                    outer.asked.append(question)
                    outer.paths.append(self.path)
                    outer.tokens.append(self.headers["Authorization"])
                    number = len(outer.asked) - 1
                status, body = answer(number, question)
                if status == 0:
                    self.close_connection = True
                    return
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    pass  # the client gave up, as it should

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
