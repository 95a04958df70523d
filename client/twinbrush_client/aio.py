"""`AsyncClient`: `Client` for asyncio, with the same methods and arguments."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any, Unpack

import grpc
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc

from twinbrush_client import wire
from twinbrush_client.client import MAX_IN_FLIGHT
from twinbrush_client.connection import Connection, Deadline
from twinbrush_client.errors import Cancelled, error_of
from twinbrush_client.fields import RequestFields
from twinbrush_client.signature import with_fields
from twinbrush_client.wire import Event, Picture, ServerInfo


class AsyncClient:
    """A Twinbrush server's client for asyncio; see `Client` for arguments and fields.

    Each event loop that uses it has a connection of its own. Cancelling a task that awaits it stops
    the work on the server.
    """

    def __init__(self, address: str = Connection.address, timeout: float = Connection.timeout,
                 **options: Any):  # fmt: skip
        self._connection = Connection(address, timeout, **options)
        self._credentials = self._connection.channel_credentials()
        self._ways: dict[asyncio.AbstractEventLoop, tuple[Any, Any]] = {}  # channels and stubs

    @property
    def _stub(self) -> Any:
        """The server's calls, over a channel of the running event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._ways:
            for ended in [known for known in list(self._ways) if known.is_closed()]:
                self._ways.pop(ended, None)
            channel = self._connection.channel(grpc.aio, self._credentials)
            self._ways[loop] = channel, service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return self._ways[loop][1]

    @with_fields
    async def generate(
        self,
        prompt: str | Sequence[str],
        *,
        timeout: float | None = None,
        **fields: Unpack[RequestFields],
    ) -> list[Image.Image]:
        """Pictures of a prompt, or of each of a list in its order; see `Client.generate`.

        Raises:
            TwinbrushError: the server refused the request or could not finish it.
        """
        requests = wire.requests(prompt, fields)
        deadline = self._connection.deadline(timeout)
        places = asyncio.Semaphore(MAX_IN_FLIGHT)

        async def answer(request: Any) -> list[Picture]:
            async with places:
                return wire.pictures(await self._answer(request, deadline))

        tasks = [asyncio.create_task(answer(request)) for request in requests]
        try:
            found = [picture for pictures in await asyncio.gather(*tasks) for picture in pictures]
        finally:
            for task in tasks:
                task.cancel()
        for text in sorted({picture.warning for picture in found} - {""}):
            warnings.warn(text, stacklevel=2)
        return [picture.image for picture in found]

    @with_fields
    def stream(
        self,
        prompt: str,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        **fields: Unpack[RequestFields],
    ) -> AsyncStream:
        """The events of a request as they come; `preview_every` asks for previews.

        The server's log and its `cancel` know the request by `request_id`.

        Raises:
            InvalidRequest: a field is unknown, or a value has the wrong type.
        """
        request = wire.stream_request(prompt, fields, request_id)
        return self._stream(request, timeout, wire.num_images(fields))

    @with_fields
    async def pictures(
        self,
        prompt: str,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        **fields: Unpack[RequestFields],
    ) -> list[Picture]:
        """The pictures of a prompt with their seeds and files; see `Client.pictures`."""
        request = wire.unary_request(prompt, fields, request_id)
        return wire.pictures(await self._answer(request, self._connection.deadline(timeout)))

    async def info(self, *, timeout: float | None = None) -> ServerInfo:
        """What the server serves: checkpoint, samplers, sizes, defaults, fields, device.

        Raises:
            TwinbrushError: the server does not answer.
        """
        stream = self._stream(wire.info_request(), timeout)
        (response,) = [response async for response in stream.responses()]
        return replace(wire.server_info(response), device=await self._device(timeout))

    async def ready(self) -> bool:
        """Whether the server takes requests."""
        request = service_pb2.ServerReadyRequest()  # pyright: ignore[reportAttributeAccessIssue]
        left, metadata = self._connection.deadline(None).left, self._connection.metadata
        try:
            answer = await self._stub.ServerReady(request, timeout=left, metadata=metadata)
        except grpc.RpcError:
            return False
        return bool(answer.ready)

    async def close(self) -> None:
        self._connection.closed.set()
        if way := self._ways.get(asyncio.get_running_loop()):
            await way[0].close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def _device(self, timeout: float | None) -> str:
        """See `ServerInfo.device`; an operator may have closed Triton's own interface."""
        left, metadata = self._connection.deadline(timeout).left, self._connection.metadata
        try:
            answer = await self._stub.ModelConfig(
                wire.placement_request(), timeout=left, metadata=metadata
            )
        except grpc.RpcError:
            return ""
        return wire.device(answer)

    def _stream(self, request: Any, timeout: float | None, pictures: int = 1) -> AsyncStream:
        deadline = self._connection.deadline(timeout)

        def start() -> Any:
            return self._stub.ModelStreamInfer(
                iter([request]), timeout=deadline.left, metadata=self._connection.metadata
            )

        return AsyncStream(start, self._connection, deadline, pictures)

    async def _answer(self, request: Any, deadline: Deadline) -> Any:
        attempt = 0
        while True:
            try:
                return await self._stub.ModelInfer(
                    request, timeout=deadline.left, metadata=self._connection.metadata
                )
            except grpc.RpcError as error:
                failure = self._connection.error(error)
            except asyncio.CancelledError:
                if _leaves():
                    raise
                raise Cancelled("CANCELLED", "the request was cancelled") from None
            if (pause := self._connection.pause(failure, attempt, deadline)) is None:
                raise failure
            await asyncio.sleep(pause)
            attempt += 1


class AsyncStream:
    """The events of one request, in order; see `Stream`."""

    def __init__(
        self,
        start: Callable[[], Any],
        connection: Connection,
        deadline: Deadline,
        pictures: int,
    ):
        self._pictures = pictures
        self._start, self._connection, self._deadline = start, connection, deadline
        self._cancelled = False
        self._call = start()

    async def __aiter__(self) -> AsyncIterator[Event]:
        async with self:
            left, responses = self._pictures, self.responses()
            async for response in responses:
                event = wire.event(response)
                left -= isinstance(event, Picture)
                if not left:  # a cancel between it and the end keeps Triton from a clean exit
                    async for _ in responses:
                        pass
                yield event

    async def responses(self) -> AsyncIterator[Any]:
        """Triton's responses, for events that this version does not know."""
        attempt, began = 0, False
        while True:
            failure = None
            try:
                async for response in self._call:
                    if response.error_message:
                        failure = error_of("", response.error_message)
                    else:
                        began = True
                        yield response
                if failure is None:
                    return
            except grpc.RpcError as error:
                failure = self._connection.error(error)
            except asyncio.CancelledError:
                if _leaves():
                    raise
                raise Cancelled("CANCELLED", "the request was cancelled") from None
            pause = self._connection.pause(failure, attempt, self._deadline)
            if began or pause is None:
                try:
                    raise failure
                finally:  # the exception has this frame, which would keep it and the connection
                    failure = None
            await asyncio.sleep(pause)
            attempt += 1
            self._restart()

    def cancel(self) -> None:
        """Ends the request; an iteration then raises `Cancelled`."""
        self._cancelled = True
        self._call.cancel()

    def _restart(self) -> None:
        if self._cancelled:
            raise Cancelled("CANCELLED", "the request was cancelled")
        self._call = self._start()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.cancel()


def _leaves() -> bool:
    """Whether a `CancelledError` is the task's own; else a request or the client was ended."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
