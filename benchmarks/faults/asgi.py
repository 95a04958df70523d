"""The gateway's application without sockets, over a server that paints nothing."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from typing import Any

from PIL import Image

from gateway.app import Settings, create_app
from gateway.backend import Backend
from gateway.gate import Gate
from gateway.keys import Key, KeyRing, Limits, digest
from gateway.pool import Pool
from twinbrush_client import Picture, ServerInfo, wire

ADDRESS = "127.0.0.1:1"  # nobody is asked there
INFO = ServerInfo(
    "1", "checkpoint", ["lcm", "ddim", "euler", "euler_a"], ["png", "jpeg"],
    {"steps": 4, "width": 64, "height": 64, "num_images": 1, "sampler": "lcm",
     "guidance_scale": 1.0},
    {"native": 64, "multiple_of": 16, "largest": 256}, [], loras=["ink"],
)  # fmt: skip
_file = io.BytesIO()
Image.new("RGB", (1, 1)).save(_file, "png")
PICTURE = _file.getvalue()


class _Client:
    """As `AsyncClient`: every request is checked as it would be sent, and has one picture."""

    async def pictures(self, prompt: str, **fields: Any) -> list[Picture]:
        return [event async for event in _Stream(prompt, fields)]

    def stream(self, prompt: str, **fields: Any) -> _Stream:
        return _Stream(prompt, fields)


class _Stream:
    def __init__(self, prompt: str, fields: dict[str, Any]):
        self._prompt, self._fields = prompt, fields

    async def __aiter__(self) -> AsyncIterator[Picture]:
        known = {k: v for k, v in self._fields.items() if k not in ("request_id", "timeout")}
        wire.stream_request(self._prompt, known)
        yield Picture(0, self._fields.get("seed") or 1, "", PICTURE)

    def cancel(self) -> None: ...


def open_app(key: str | None = None) -> Callable[[str, dict[str, str], bytes], tuple[int, bytes]]:
    """The application as a function of path, headers and body; returns status and answer.

    A request with a body is a POST, one without a GET.

    Args:
        key: that callers need; None lets everybody in.
    """
    backend = Backend.__new__(Backend)
    vars(backend).update(
        address=ADDRESS, client=_Client(), info=INFO, since=1, outstanding=0.0, turn=0,
        _ejected_until=0.0, _hold=1.0, _answers=True,
    )  # fmt: skip
    pool = Pool([ADDRESS], 5.0)
    pool._backends[ADDRESS] = backend
    keys = [Key("ann", digest(key), Limits(None, None, None))] if key else []
    settings = Settings(KeyRing(keys, Limits(None, None, None)), page=False)
    app = create_app(pool, settings, Gate())
    loop = asyncio.new_event_loop()
    return lambda path, headers, body: loop.run_until_complete(_call(app, path, headers, body))


async def _call(app: Any, target: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
    path, _, query = target.partition("?")
    coming = asyncio.Queue()
    coming.put_nowait({"type": "http.request", "body": body})
    status, answer = 0, b""

    async def send(message: dict[str, Any]) -> None:
        nonlocal status, answer
        status = message.get("status", status)
        answer += message.get("body", b"")

    scope = {
        "type": "http", "method": "POST" if body else "GET", "path": path, "http_version": "1.1",
        "query_string": query.encode("latin-1"), "scheme": "http", "server": ("127.0.0.1", 80),
        "root_path": "", "client": ("127.0.0.1", 1),
        "headers": [(n.encode("latin-1"), v.encode("latin-1")) for n, v in headers.items()],
    }  # fmt: skip
    await asyncio.wait_for(app(scope, coming.get, send), 10)
    return status, answer
