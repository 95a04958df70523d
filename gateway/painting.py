"""One request's way to the servers and back, which all doors share."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from starlette.requests import Request

from gateway.disconnect import while_connected
from gateway.errors import ApiError
from gateway.files import Files
from gateway.limits import Meter
from gateway.metrics import Metrics
from gateway.pool import Job, Pool, UnknownModel, work_of
from twinbrush_client import Picture, ServerInfo, TwinbrushError


@dataclass(frozen=True)
class Studio:
    """What the doors need of the gateway."""

    pool: Pool
    meter: Meter
    files: Files
    metrics: Metrics
    public_url: str | None  # that clients reach the gateway by; None takes each request's own

    async def info(self, model: str | None = None) -> ServerInfo:
        """Raises ApiError where no server has the model, or none answers."""
        try:
            return await self.pool.info(model)
        except UnknownModel as error:
            raise ApiError(404, str(error), param="model", code="model_not_found") from None
        except TwinbrushError as error:
            raise ApiError.of(error) from None

    @contextlib.asynccontextmanager
    async def painting(
        self,
        request: Request,
        prompt: str,
        model: str | None,
        fields: Mapping[str, Any],
        names: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Job]:
        """A request to the servers, within the caller's limits; a client that leaves cancels it.

        Args:
            request: whose body has been read.
            names: the door's names of a server's fields, for errors.

        Raises:
            ApiError: in place of a server's errors.
        """
        info = await self.info(model)
        key, request_id = request.state.key, request.state.request_id
        with self._admitted(request, work_of(fields, info)):
            job = self.pool.stream(
                prompt, model=model, request_id=request_id, client=key.client, **fields
            )
            try:
                async with while_connected(request, job.cancel):
                    yield job
            except TwinbrushError as error:
                raise ApiError.of(error, names) from None
            finally:
                job.cancel()

    @contextlib.contextmanager
    def _admitted(self, request: Request, work: float) -> Iterator[None]:
        """A place within the caller's limits; the answer's headers say what is left."""
        key, state = request.state.key, request.state
        try:
            with self.meter.admit(key, work):
                state.headers = self.meter.headers(key)
                yield
        except ApiError:
            state.headers = self.meter.headers(key)
            raise

    async def pictures(self, job: Job) -> list[Picture]:
        """All pictures of a request, in order."""
        found = [event async for event in job if isinstance(event, Picture)]
        self.metrics.pictures.inc(len(found))
        return sorted(found, key=lambda picture: picture.index)


async def enlarged(preview: Image.Image, size: tuple[int, int], image_format: str) -> bytes:
    """A preview as a file of the picture's size, made in a thread."""

    def encode() -> bytes:
        buffer = io.BytesIO()
        preview.resize(size, Image.Resampling.BICUBIC).save(buffer, image_format)
        return buffer.getvalue()

    return await asyncio.to_thread(encode)


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()
