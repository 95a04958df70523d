"""OpenAI's doors: `/v1/images/generations`, `/v1/images/edits`, `/v1/models`."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gateway.backend import Backend
from gateway.errors import STATUSES, ApiError
from gateway.openai_fields import NAMES, GenerationBody
from gateway.openai_schema import ErrorAnswer, ImagesAnswer, Model, Models
from gateway.painting import Studio, base64_of, enlarged
from gateway.pool import unknown_model
from twinbrush_client import Picture, Preview, ServerInfo
from twinbrush_client.wire import Event

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": description}
    for status, description in STATUSES.items()
}
QUIET_SECONDS = 15.0  # after which a stream sends a comment: proxies close connections that rest
SSE_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


def router(studio: Studio) -> APIRouter:
    """The routes under `/v1`."""
    routes = APIRouter(prefix="/v1", responses=ERRORS, tags=["OpenAI"])

    @routes.post(
        "/images/generations",
        responses={200: {"model": ImagesAnswer, "content": {"text/event-stream": {}}}},
    )
    async def generate(body: GenerationBody, request: Request) -> Response:
        """Paints images of a prompt; with `stream`, as server-sent events."""
        body.check()
        generation = _Generation(studio, body, await studio.info(body.model), request)
        return await (generation.stream() if body.stream else generation.answer())

    @routes.post("/images/variations", responses={200: {"description": "Never, so far."}})
    @routes.post("/images/edits", responses={200: {"description": "Never, so far."}})
    async def edit() -> Response:
        """Refuses: no checkpoint takes image inputs yet."""
        text = "Image inputs are not served; use /v1/images/generations."
        raise ApiError(400, text, param="image", code="unsupported_endpoint")

    @routes.get("/images/files/{name}", response_class=Response)
    async def file(name: str, expires: int, signature: str) -> Response:
        """A picture of `response_format: url`. Its signature is the key."""
        found = studio.files.find(name, expires, signature)
        if found is None:
            raise ApiError(404, "The picture's URL is wrong or has expired.", code="not_found")
        headers = {"cache-control": f"private, max-age={max(0, found.expires - int(time.time()))}"}
        return Response(found.data, media_type=found.media_type, headers=headers)

    @routes.get("/models", responses={200: {"model": Models}})
    async def models() -> Response:
        """The checkpoints that are served."""
        data = [_model(name, backend) for name, backend in studio.pool.models().items()]
        return JSONResponse({"object": "list", "data": data})

    @routes.get("/models/{model:path}", responses={200: {"model": Model}})
    async def model(model: str) -> Response:
        """One of the checkpoints."""
        found = studio.pool.models().get(model)
        if found is None:
            text = str(unknown_model(model, studio.pool.models()))
            raise ApiError(404, text, param="model", code="model_not_found")
        return JSONResponse(_model(model, found))

    return routes


def _model(name: str, backend: Backend) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": backend.since, "owned_by": "twinbrush"}


class _Generation:
    """One request for images and its answer."""

    def __init__(self, studio: Studio, body: GenerationBody, info: ServerInfo, request: Request):
        self._studio, self._body, self._info, self._request = studio, body, info, request
        self._fields = body.fields(info)
        self._previews: dict[int, int] = {}  # sent, of each image
        self._quiet_until = time.monotonic() + QUIET_SECONDS

    def _painting(self) -> Any:
        body = self._body
        return self._studio.painting(self._request, body.prompt, body.model, self._fields, NAMES)

    async def answer(self) -> Response:
        """All images in one JSON object."""
        async with self._painting() as job:
            pictures = await self._studio.pictures(job)
        data = [self._image(picture) for picture in pictures]
        usage = self._body.usage(self._info, len(pictures))
        return JSONResponse({"created": _now(), "data": data, **self._echo(), "usage": usage})

    async def stream(self) -> Response:
        """Server-sent events. What fails before the first event is an answer of its own status."""
        async with AsyncExitStack() as stack:
            job = await stack.enter_async_context(self._painting())
            events = aiter(job)
            first = await anext(events)
            kept = stack.pop_all()
        return _EventStream(kept, self._sent(kept, first, events))

    async def _sent(
        self, stack: AsyncExitStack, first: Event, events: AsyncIterator[Event]
    ) -> AsyncIterator[str]:
        try:
            async with stack:
                for text in await self._told(first):
                    yield text
                async for event in events:
                    for text in await self._told(event):
                        yield text
        except ApiError as error:
            yield _sse("error", {"type": "error", **error.body()})

    async def _told(self, event: Event) -> list[str]:
        """The server-sent events of a server's event."""
        if isinstance(event, Preview):
            number = self._previews.get(event.index, 0)
            if number >= (self._body.partial_images or 0):
                return []
            self._previews[event.index] = number + 1
            size = self._fields["width"], self._fields["height"]
            data = await enlarged(event.image, size, self._body.image_format)
            more = {"partial_image_index": number, "image_index": event.index}
            return [self._event("image_generation.partial_image", data, more)]
        if isinstance(event, Picture):
            self._studio.metrics.pictures.inc()
            more = {"usage": self._body.usage(self._info, 1), "image_index": event.index}
            return [self._event("image_generation.completed", event.data, more | _seed(event))]
        if time.monotonic() < self._quiet_until:
            return []
        self._quiet_until = time.monotonic() + QUIET_SECONDS
        return [": painting\n\n"]

    def _event(self, kind: str, data: bytes, more: dict[str, Any]) -> str:
        common = {"type": kind, "b64_json": base64_of(data), "created_at": _now()}
        return _sse(kind, common | self._echo() | more)

    def _image(self, picture: Picture) -> dict[str, Any]:
        if self._body.response_format != "url":
            return {"b64_json": base64_of(picture.data)} | _seed(picture)
        try:
            path = self._studio.files.add(picture.data, self._body.image_format)
        except ValueError as error:
            raise ApiError(400, f"response_format='url': {error}.", param="response_format",
                           code="invalid_value") from None  # fmt: skip
        base = self._studio.public_url or str(self._request.base_url)
        return {"url": f"{base.rstrip('/')}/v1/images/files/{path}"} | _seed(picture)

    def _echo(self) -> dict[str, Any]:
        body, fields = self._body, self._fields
        echo = {
            "background": "opaque",
            "output_format": body.image_format,
            "quality": body.chosen_quality,
            "size": f"{fields['width']}x{fields['height']}",
        }
        return echo | ({"safety_identifier": body.identifier} if body.identifier else {})


class _EventStream(StreamingResponse):
    """Server-sent events that end their request also where they were never read."""

    def __init__(self, stack: AsyncExitStack, body: AsyncIterator[str]):
        super().__init__(body, media_type="text/event-stream", headers=SSE_HEADERS)
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._stack.aclose()


def _seed(picture: Picture) -> dict[str, Any]:
    """Twinbrush's own: what paints the image again, and the server's warning."""
    return {"seed": picture.seed} | ({"warning": picture.warning} if picture.warning else {})


def _sse(event: str, data: dict[str, Any]) -> str:
    return f"event: {event}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


def _now() -> int:
    return int(time.time())
