"""Runs the application under uvicorn, with a drain in front of its shutdown."""

from __future__ import annotations

import contextlib
import gc
import logging
import resource
import socket
import time
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from gateway.gate import Gate
from gateway.pool import Pool

log = logging.getLogger(__name__)
LAST_ANSWERS = 2  # seconds that cancelled requests have to write their errors
REQUEST_SECONDS = 20.0  # that a connection may take until its next request has its headers
MOST_FILES = 1 << 16


class DrainingServer(uvicorn.Server):
    """A first signal refuses new requests and lets live ones finish; a second ends it at once."""

    def __init__(self, config: uvicorn.Config, gate: Gate, pool: Pool, drain_seconds: float):
        super().__init__(config)
        self._gate, self._pool, self._drain_seconds = gate, pool, drain_seconds
        self._until = 0.0
        # Connections without a request: their last one, and since when they wait for the next.
        self._waiting: dict[Any, tuple[object, float]] = {}

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # What the start made stays: a collection of it would stop all requests for 0.1 s and more.
        gc.collect()
        gc.freeze()
        if self.servers:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            scheme = "https" if self.config.is_ssl else "http"
            host = f"[{host}]" if ":" in host else host
            app: Any = self.config.app
            page = "the page, " if app.state.has_page else ""
            print(
                f"gateway: {scheme}://{host}:{port} serves {page}/v1, /sdapi/v1 and /docs",
                flush=True,
            )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._gate.draining:
            self.should_exit = True
            return
        self._gate.draining = True
        self._until = time.monotonic() + self._drain_seconds

    async def on_tick(self, counter: int) -> bool:
        ended = await super().on_tick(counter)
        if counter % 10 == 0:  # once a second
            self._close_idle(time.monotonic())
        late = time.monotonic() >= self._until
        if not self._gate.draining or not (ended or late or self._gate.live == 0):
            return ended
        if self._gate.live:
            log.warning("not all live requests have ended: %d", self._gate.live)
            self._pool.cancel_all()
        return True

    def _close_idle(self, now: float) -> None:
        """Closes connections that send no request; uvicorn itself would wait for ever."""
        waiting: dict[Any, tuple[object, float]] = {}
        for connection in list(self.server_state.connections):
            last = getattr(connection, "cycle", self)  # a web socket has none
            if last is not None and not getattr(last, "response_complete", False):
                continue
            known, since = self._waiting.get(connection, (self, now))
            since = since if known is last else now
            waiting[connection] = last, since
            if now - since > REQUEST_SECONDS:
                connection.transport.close()
        self._waiting = waiting


def allow_many_files() -> None:
    """Raises this process's limit of open files; each connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):  # a confined process keeps what it has
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def run(app: FastAPI, gate: Gate, pool: Pool, drain_seconds: float, **options: Any) -> None:
    """Serves until a signal comes and the drain has ended.

    Args:
        options: uvicorn's, such as `host`, `port` and `ssl_certfile`.
    """
    allow_many_files()
    config = uvicorn.Config(
        app, timeout_graceful_shutdown=LAST_ANSWERS, access_log=False,
        http="h11",  # httptools, which uvicorn prefers, bounds neither headers nor URLs
        **options,
    )  # fmt: skip
    DrainingServer(config, gate, pool, drain_seconds).run()
