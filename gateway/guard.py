"""What every request passes: its id, the drain, its key, and the metrics. Reads no bodies.

It is plain ASGI, so that handlers see when their client leaves.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import CLIENT_LEFT, ApiError
from gateway.gate import Gate
from gateway.keys import SCHEMES, KeyRing
from gateway.metrics import NO_ROUTE, Metrics

log = logging.getLogger(__name__)
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
LOCKED = ("/v1/", "/sdapi/", "/metrics")  # paths that need a key where there are any
FILES = "/v1/images/files/"  # signed URLs are their own key
ALWAYS = ("/health/", "/metrics")  # paths that a drain leaves open
BODY_SECONDS = 30.0  # that a client may take between two parts of a request's body
IDLE = "/gradio_api/heartbeat/"  # a request that lives as long as a page is open


class Guard:
    """Middleware around the doors.

    A handler finds the caller's `Key` and the request's id in `request.state`, and leaves
    `headers` of its answer there.
    """

    def __init__(self, app: ASGIApp, gate: Gate, keys: KeyRing, metrics: Metrics, max_body: int):
        self.app, self._gate, self._keys, self._metrics = app, gate, keys, metrics
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = _plain(scope)
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        began, status, size, reads = time.perf_counter(), 0, 0, True

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(
                    {"x-request-id": request_id} | scope["state"].get("headers", {})
                )
            await send(message)

        async def bounded() -> Message:
            nonlocal size, reads
            try:
                message = await asyncio.wait_for(receive(), BODY_SECONDS if reads else None)
            except TimeoutError:
                text = f"nothing of the body has come for {BODY_SECONDS:g} s"
                raise HTTPException(408, text) from None
            reads = message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > self._max_body:
                raise HTTPException(413, f"the body has more than {self._max_body} bytes")
            return message

        holds = not scope["path"].startswith((*ALWAYS, IDLE))
        self._gate.live += holds
        self._metrics.live.inc()
        try:
            if refusal := self._refusal(scope, headers):
                await refusal.response(scope["path"])(scope, receive, answer)
            else:
                await self.app(scope, bounded, answer)
        except Exception:
            log.exception("request %s failed", request_id)
            if status:  # the answer has begun: only a broken connection can say so
                raise
            text = f"The gateway failed; its log has the reason, at {request_id}."
            fault = ApiError(500, text, code="server_error", type="server_error")
            await fault.response(scope["path"])(scope, receive, answer)
        finally:
            self._gate.live -= holds
            self._metrics.live.dec()
            self._count(scope, status or CLIENT_LEFT, time.perf_counter() - began)

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        path = scope["path"]
        if self._gate.draining and not path.startswith(ALWAYS):
            return ApiError(
                503, "The gateway is shutting down.", code="draining", type="server_error",
                retry_after=1.0,
            )  # fmt: skip
        if not scope["query_string"].isascii():
            text = "The URL's query must be percent-encoded: it has bytes beyond ASCII."
            return ApiError(400, text, code="invalid_value")
        key = self._keys.find(headers.get("authorization"))
        scope["state"]["key"] = key
        if key is None and path.startswith(LOCKED) and not path.startswith(FILES):
            shown = headers.get("authorization", "").partition(" ")[0].lower() in SCHEMES
            text = "Incorrect API key provided." if shown else (
                "You didn't provide an API key. Send it as `Authorization: Bearer KEY`."
            )  # fmt: skip
            return ApiError(401, text, code="invalid_api_key")
        encoding = headers.get("content-encoding", "")
        if encoding.lower() not in ("", "identity"):
            text = f"content-encoding: {encoding} is not supported: send the body as it is."
            return ApiError(415, text, code="unsupported_encoding")
        length = headers.get("content-length", "")
        # Python refuses to read a number of thousands of digits.
        if length.isdecimal() and (len(length) > 20 or int(length) > self._max_body):
            text = f"The body has {length[:20]} bytes; at most {self._max_body} are allowed."
            return ApiError(413, text, code="body_too_large")
        return None

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or NO_ROUTE
        self._metrics.requests.labels(route, status).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        log.info(
            "%s %s %d %.0f ms %s", scope["method"], scope["path"], status, 1000 * seconds,
            scope["state"]["request_id"],
        )  # fmt: skip


def _plain(scope: Scope) -> Scope:
    """As the doors read it: HEAD as GET, of which uvicorn leaves the body out, and no slash at the
    end, which would be redirected to a URL that a proxy in front may not have.
    """
    method, path = scope["method"], scope["path"]
    return {
        **scope,
        "method": "GET" if method == "HEAD" else method,
        "path": path.rstrip("/") if path.startswith(LOCKED) else path,
    }
