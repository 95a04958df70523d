"""`Client`: pictures in one call, or as a stream that can be cancelled."""

from __future__ import annotations

import queue
import threading
import uuid
import warnings
from collections.abc import Iterator
from typing import Any

import tritonclient.grpc as grpc
from PIL import Image
from tritonclient.utils import InferenceServerException

from twinbrush_client import wire
from twinbrush_client.wire import Picture, Progress, TwinbrushError

UNARY, STREAM = "text_to_image", "text_to_image_stream"
TIMEOUT = 300.0  # seconds
IMAGE_FORMATS = ("png", "jpeg")  # that come as a picture; servers also send what is none


class Client:
    """A Twinbrush server's client. Safe to use from several threads.

    Args:
        address: host and port of the server's gRPC endpoint.
        timeout: seconds that a request may take in all; a server that hangs ends it too.

    The fields of a request are those of the server: `negative_prompt`, `seed`, `steps`,
    `guidance_scale`, `width`, `height`, `sampler`, `deterministic`, and `image_format`, which is
    png or jpeg here; what is left out takes the served checkpoint's default.
    """

    def __init__(self, address: str = "127.0.0.1:8001", timeout: float = TIMEOUT):
        self._address, self._timeout = address, timeout
        self._client = grpc.InferenceServerClient(address)

    def generate(self, prompt: str, num_images: int = 1, **fields: Any) -> list[Image.Image]:
        """Pictures of a prompt; each one's seed is its `info["seed"]`.

        What the server warns of (a prompt that was cut) is a `UserWarning`. An interrupt
        (Ctrl-C) cancels the work on the server.

        Raises:
            TwinbrushError: the server refused the request or could not finish it.
        """
        inputs = _inputs(prompt, num_images, fields)
        answers: queue.SimpleQueue = queue.SimpleQueue()
        call: Any = self._client.async_infer(
            UNARY,
            inputs,
            lambda result, error: answers.put((result, error)),
            client_timeout=self._timeout,
        )
        try:
            result, error = answers.get()
        except BaseException:
            call.cancel()
            raise
        if error is not None:
            raise TwinbrushError.of(error)
        warning = result.as_numpy("warning")[0]
        if warning:
            warnings.warn(warning.decode(), stacklevel=2)
        rows = zip(result.as_numpy("image"), result.as_numpy("seed"), strict=True)
        return [wire.picture(data, i, int(s), warning).image for i, (data, s) in enumerate(rows)]

    def stream(self, prompt: str, num_images: int = 1, **fields: Any) -> Stream:
        """The events of a request as they come; `preview_every` asks for previews.

        Raises:
            TwinbrushError: a value does not fit its field.
        """
        return Stream(self._address, _inputs(prompt, num_images, fields), self._timeout)

    def ready(self) -> bool:
        """Whether the server takes requests."""
        try:
            return bool(self._client.is_server_ready())
        except InferenceServerException:
            return False

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _inputs(prompt: str, num_images: int, fields: dict[str, Any]) -> list[grpc.InferInput]:
    """Raises TwinbrushError where a value does not fit its field, or no picture can come of it."""
    if (wanted := fields.get("image_format")) not in (None, *IMAGE_FORMATS):
        text = f"image_format={wanted!r} is not allowed: {' or '.join(IMAGE_FORMATS)} are"
        raise TwinbrushError("INVALID_ARGUMENT", text)
    return wire.inputs({"prompt": prompt, "num_images": num_images, **fields})


class Stream:
    """The events of one request, in order. Iterate over it once.

    Leaving it early (`cancel`, its context, an exception) stops the work on the server.

    Raises:
        TwinbrushError: while iterating, where the server refused or ended the request.
    """

    def __init__(self, address: str, inputs: list[grpc.InferInput], timeout: float):
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        self._client = grpc.InferenceServerClient(address)
        self._client.start_stream(
            lambda result, error: self._answers.put((result, error)), stream_timeout=timeout
        )
        try:
            self._client.async_stream_infer(
                STREAM, inputs, request_id=uuid.uuid4().hex, enable_empty_final_response=True
            )
        except InferenceServerException:
            raise TwinbrushError("UNAVAILABLE", f"no server answers at {address}") from None
        self._open = True
        self._leaving = threading.Lock()

    def __iter__(self) -> Iterator[Progress | Picture]:
        try:
            while True:
                result, error = self._answers.get()
                if error is not None:
                    raise TwinbrushError.of(error)
                response = result.get_response()
                if response.outputs:
                    yield wire.event(result)
                if response.parameters["triton_final_response"].bool_param:
                    self._leave(cancel_requests=False)
                    return
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Ends the request; a stream that has ended stays as it is. From any thread.

        Who iterates gets what had come before, then a `TwinbrushError` of code CANCELLED.
        """
        self._leave(cancel_requests=True)

    def _leave(self, cancel_requests: bool) -> None:
        """A cancel after the last response would keep the server from a clean exit."""
        with self._leaving:
            was_open, self._open = self._open, False
        if was_open:
            self._client.stop_stream(cancel_requests)
            self._client.close()
            self._answers.put((None, InferenceServerException("cancelled", "CANCELLED")))

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()
