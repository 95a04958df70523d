"""Whoever closes the connection ends the work: a watch on a request's client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.requests import Request


@asynccontextmanager
async def while_connected(request: Request, on_leave: Callable[[], None]) -> AsyncIterator[None]:
    """Within, `on_leave` is called when the client goes. The request's body must have been read."""
    watch = asyncio.create_task(_watch(request, on_leave))
    try:
        yield
    finally:
        watch.cancel()


async def _watch(request: Request, on_leave: Callable[[], None]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    on_leave()
