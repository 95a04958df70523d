"""`/live` and `/ready` of the launcher, for load balancers and Kubernetes.

Triton stays ready while it drains, because it ends live requests as soon as it is told to stop;
this endpoint turns not ready first. Knows nothing of Triton.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Health:
    """What the endpoint answers; the launcher sets `state` as the server's changes."""

    def __init__(self) -> None:
        self.state = "starting"  # then "ready", "draining", "restarting"

    def serve(self, address: str, port: int) -> None:
        """Answers HTTP from a daemon thread.

        Raises:
            OSError: the port cannot be used.
        """
        server = _server_class(address)((address, port), _handler(self))
        threading.Thread(target=server.serve_forever, name="health", daemon=True).start()


def _server_class(address: str) -> type[ThreadingHTTPServer]:
    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A probe that leaves before its answer is none of the log's; others end a thread."""
            if not isinstance(sys.exception(), OSError):
                raise

    return Server


def _handler(health: Health) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 5  # seconds that a client may take to send its request

        def do_GET(self) -> None:
            state = health.state
            codes = {"/live": 200, "/ready": 200 if state == "ready" else 503}
            code = codes.get(self.path.partition("?")[0], 404)
            body = json.dumps({"state": state} if code != 404 else {"paths": list(codes)}).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Probes are not logged."""

    return Handler
