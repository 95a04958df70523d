"""Runs the application under uvicorn, with a drain in front of its shutdown."""

from __future__ import annotations

import logging
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


class DrainingServer(uvicorn.Server):
    """A first signal refuses new requests and lets live ones finish; a second ends it at once."""

    def __init__(self, config: uvicorn.Config, gate: Gate, pool: Pool, drain_seconds: float):
        super().__init__(config)
        self._gate, self._pool, self._drain_seconds = gate, pool, drain_seconds
        self._until = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.servers:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            scheme = "https" if self.config.is_ssl else "http"
            host = f"[{host}]" if ":" in host else host
            print(
                f"gateway: {scheme}://{host}:{port} serves the page, /v1, /sdapi/v1 and /docs",
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
        late = time.monotonic() >= self._until
        if not self._gate.draining or not (ended or late or self._gate.live == 0):
            return ended
        if self._gate.live:
            log.warning("not all live requests have ended: %d", self._gate.live)
            self._pool.cancel_all()
        return True


def run(app: FastAPI, gate: Gate, pool: Pool, drain_seconds: float, **options: Any) -> None:
    """Serves until a signal comes and the drain has ended.

    Args:
        options: uvicorn's, such as `host`, `port` and `ssl_certfile`.
    """
    config = uvicorn.Config(
        app, timeout_graceful_shutdown=LAST_ANSWERS, access_log=False,
        http="h11",  # httptools, which uvicorn prefers, bounds neither headers nor URLs
        **options,
    )  # fmt: skip
    DrainingServer(config, gate, pool, drain_seconds).run()
