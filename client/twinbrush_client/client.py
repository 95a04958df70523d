"""`Client`: pictures in one call, or as a stream that can be cancelled."""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Unpack

import grpc
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc

from twinbrush_client import wire
from twinbrush_client.connection import Connection, Deadline
from twinbrush_client.errors import Cancelled, error_of
from twinbrush_client.fields import RequestFields
from twinbrush_client.signature import with_fields
from twinbrush_client.wire import Event, Picture, ServerInfo

MAX_IN_FLIGHT = 16  # prompts of a list that are with the server at once


class Client:
    """A Twinbrush server's client. Safe to use from several threads.

    Args:
        address: host and port of the server's gRPC endpoint.
        options: `timeout` in seconds (300), `max_retries` (2), `headers`, `tls`, `credentials`:
            see `Connection`.

    The fields of a request are those of the server, and diffusers' names of `steps` and
    `num_images`. A field that is left out takes the served checkpoint's default; `image_format`
    is png, jpeg, webp or avif here, and png by default.
    """

    def __init__(self, address: str = Connection.address, timeout: float = Connection.timeout,
                 **options: Any):  # fmt: skip
        self._connection = Connection(address, timeout, **options)
        self._channel = self._connection.channel(grpc, self._connection.channel_credentials())
        self._stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    @with_fields
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        timeout: float | None = None,
        **fields: Unpack[RequestFields],
    ) -> list[Image.Image]:
        """Pictures of a prompt, or of each of a list in its order; `info["seed"]` is the seed.

        With a list, `seed` is the first picture's and the others count up. A warning of the
        server (a prompt was truncated) is a `UserWarning`. An interrupt (Ctrl-C) cancels the
        work on the server.

        Raises:
            TwinbrushError: the server refused the request or could not finish it.
        """
        requests = wire.requests(prompt, fields)
        found: list[Picture] = []
        for response in self._answers(requests, self._connection.deadline(timeout)):
            found += wire.pictures(response)
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
    ) -> Stream:
        """The events of a request as they come; `preview_every` asks for previews.

        The server's log and its `cancel` know the request by `request_id`.

        Raises:
            InvalidRequest: a field is unknown, or a value has the wrong type.
        """
        request = wire.stream_request(prompt, fields, request_id)
        return self._stream(request, timeout, wire.num_images(fields))

    @with_fields
    def pictures(
        self,
        prompt: str,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        **fields: Unpack[RequestFields],
    ) -> list[Picture]:
        """The pictures of a prompt with their seeds and files as they came, all at the end.

        Raises:
            TwinbrushError: the server refused the request or could not finish it.
        """
        request = wire.unary_request(prompt, fields, request_id)
        (response,) = self._answers([request], self._connection.deadline(timeout))
        return wire.pictures(response)

    def info(self, *, timeout: float | None = None) -> ServerInfo:
        """What the server serves: checkpoint, samplers, sizes, defaults, fields, device.

        Raises:
            TwinbrushError: the server does not answer.
        """
        (response,) = self._stream(wire.info_request(), timeout).responses()
        return replace(wire.server_info(response), device=self._device(timeout))

    def ready(self) -> bool:
        """Whether the server takes requests."""
        request = service_pb2.ServerReadyRequest()  # pyright: ignore[reportAttributeAccessIssue]
        left, metadata = self._connection.deadline(None).left, self._connection.metadata
        try:
            answer = self._stub.ServerReady(request, timeout=left, metadata=metadata)
        except grpc.RpcError:
            return False
        return bool(answer.ready)

    def close(self) -> None:
        self._connection.closed.set()
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _device(self, timeout: float | None) -> str:
        """See `ServerInfo.device`; an operator may have closed Triton's own interface."""
        left, metadata = self._connection.deadline(timeout).left, self._connection.metadata
        try:
            answer = self._stub.ModelConfig(
                wire.placement_request(), timeout=left, metadata=metadata
            )
        except grpc.RpcError:
            return ""
        return wire.device(answer)

    def _stream(self, request: Any, timeout: float | None, pictures: int = 1) -> Stream:
        deadline = self._connection.deadline(timeout)

        def start() -> Any:
            return self._stub.ModelStreamInfer(
                iter([request]), timeout=deadline.left, metadata=self._connection.metadata
            )

        return Stream(start, self._connection, deadline, pictures)

    def _answers(self, requests: Sequence[Any], deadline: Deadline) -> Iterator[Any]:
        """The responses in order; if one fails, or the caller leaves, the others are cancelled."""
        sent: deque[tuple[Any, Any]] = deque()
        try:
            for request in requests:
                if len(sent) == MAX_IN_FLIGHT:
                    yield self._answer(*sent.popleft(), deadline)
                sent.append((request, self._send(request, deadline)))
            while sent:
                yield self._answer(*sent.popleft(), deadline)
        finally:
            for _, call in sent:
                call.cancel()

    def _send(self, request: Any, deadline: Deadline) -> Any:
        metadata = self._connection.metadata
        return self._stub.ModelInfer.future(request, timeout=deadline.left, metadata=metadata)

    def _answer(self, request: Any, call: Any, deadline: Deadline) -> Any:
        attempt = 0
        while True:
            try:
                return call.result()
            except grpc.RpcError as error:
                failure = self._connection.error(error)
            except grpc.FutureCancelledError:
                raise Cancelled("CANCELLED", "the request was cancelled") from None
            except BaseException:
                call.cancel()
                raise
            if (pause := self._connection.pause(failure, attempt, deadline)) is None:
                raise failure
            time.sleep(pause)
            attempt += 1
            call = self._send(request, deadline)


class Stream:
    """The events of one request, in order. Iterate over it once.

    Leaving it early (`cancel`, its context, an exception) stops the work on the server. Before
    its first event, a request is sent again as `max_retries` allows.

    Raises:
        TwinbrushError: while iterating, where the server refused or ended the request.
    """

    def __init__(
        self,
        start: Callable[[], Any],
        connection: Connection,
        deadline: Deadline,
        pictures: int,
    ):
        self._pictures = pictures
        self._start, self._connection, self._deadline = start, connection, deadline
        self._lock = threading.Lock()  # guards the two below
        self._cancelled = False
        self._call = start()

    def __iter__(self) -> Iterator[Event]:
        with self:
            left, responses = self._pictures, self.responses()
            for response in responses:
                event = wire.event(response)
                left -= isinstance(event, Picture)
                if not left:  # a cancel between it and the end keeps Triton from a clean exit
                    deque(responses, 0)
                yield event

    def responses(self) -> Iterator[Any]:
        """Triton's responses, for events that this version does not know."""
        attempt, began = 0, False
        while True:
            failure = None
            try:
                for response in self._call:
                    if response.error_message:
                        failure = error_of("", response.error_message)
                    else:
                        began = True
                        yield response
                if failure is None:
                    return
            except grpc.RpcError as error:
                failure = self._connection.error(error)
            pause = self._connection.pause(failure, attempt, self._deadline)
            if began or pause is None:
                try:
                    raise failure
                finally:  # the exception has this frame, which would keep it and the connection
                    failure = None
            time.sleep(pause)
            attempt += 1
            self._restart()

    def cancel(self) -> None:
        """Ends the request, from any thread; a stream that has ended stays as it is.

        An iteration gets the events that had come before, then raises `Cancelled`.
        """
        with self._lock:
            self._cancelled = True
            self._call.cancel()

    def _restart(self) -> None:
        with self._lock:
            if self._cancelled:
                raise Cancelled("CANCELLED", "the request was cancelled")
            self._call = self._start()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()
