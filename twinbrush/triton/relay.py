"""The socket from the unary front door's process to the engine's.

Messages are frames: the lengths of a header and of a body, the header as JSON, the body as bytes
(images, or the values of fields). Both sides bound what they read. The socket has an abstract name,
so it leaves no file behind, and both sides refuse a peer of another user. Knows neither Triton nor
diffusion.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from twinbrush.engine.admission import LONGEST_HOLD
from twinbrush.engine.generation import (
    End,
    EngineError,
    Event,
    Finished,
    Generation,
    Progress,
)
from twinbrush.engine.tracing import Origin

log = logging.getLogger(__name__)
Submit = Callable[[dict[str, np.ndarray], Callable[[Event], None], Origin], Generation]
Done = Callable[[list[Finished] | EngineError], None]

LENGTHS = struct.Struct("<II")  # of header and body, in bytes
MAX_HEADER = 1 << 16
MAX_REQUEST = 1 << 20  # bytes of a request's body
MAX_IMAGE = 1 << 31  # bytes of an image
TEXT = "text"
KINDS = frozenset({TEXT, "bool", "int32", "int64", "float32"})  # of fields
PEER = struct.Struct("3i")  # process, user, group


def relay_address() -> str:
    """The socket's name, the same in all processes that one Triton server has started."""
    processes = os.stat("/proc/self/ns/pid").st_ino  # two containers may share a network
    return f"\0twinbrush-{processes}-{os.getppid()}"


class RelayServer:
    """Takes requests from the socket to `submit`, and brings back what it replies.

    `submit` takes fields, a callback for events, and the request's origin. What it raises is the
    end of its request.

    Raises:
        OSError: the address is taken.
    """

    def __init__(self, address: str, submit: Submit):
        try:
            self._server = _Listener(address, _Connection)
        except OSError as error:
            text = f"a server has one engine, and one listens already ({error.strerror})"
            raise OSError(error.errno, f"{text}: unload it first, and run one instance") from None
        self._server.submit = submit
        threading.Thread(target=self._server.serve_forever, name="relay", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Listener(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False
    submit: Submit

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return _same_user(request)


class _Connection(socketserver.StreamRequestHandler):
    """One client; its requests are cancelled when it goes."""

    server: _Listener

    def setup(self) -> None:
        super().setup()
        self._live: dict[int, Generation] = {}
        self._sending = threading.Lock()

    def handle(self) -> None:
        try:
            while (frame := _read(self.rfile, MAX_REQUEST)) is not None:
                message, body = frame
                ticket = message["ticket"]
                if "fields" in message:
                    self._start(ticket, *_submission(message, body))
                elif (generation := self._live.get(ticket)) is not None:
                    generation.cancel()
        except OSError as error:
            log.warning("the relay has closed a connection: %s", error)
        finally:
            for generation in list(self._live.values()):
                generation.cancel()

    def _start(self, ticket: int, fields: dict[str, np.ndarray], origin: Origin) -> None:
        def reply(event: Event) -> None:
            if isinstance(event, End):
                self._live.pop(ticket, None)
            self._send(ticket, event)

        try:
            generation = self.server.submit(fields, reply, origin)
        except Exception as error:
            self._send(ticket, End(EngineError.of(error, origin.request_id)))
            return
        self._live[ticket] = generation
        if generation.ended:  # before it was known here
            self._live.pop(ticket, None)

    def _send(self, ticket: int, event: Event) -> None:
        image = b""
        message: dict[str, Any] = {"ticket": ticket}
        match event:
            case Finished(index, seed, image, warnings):
                message |= {"index": index, "seed": seed, "warnings": warnings}
            case End(error):
                message["error"] = error and [error.code, str(error), error.hold]
        if isinstance(event, Progress):
            return  # a unary response has none
        with self._sending, contextlib.suppress(OSError):  # the peer has gone
            self.wfile.write(_frame(message, image))


class RelayClient:
    """Sends requests to a `RelayServer`; connects when the first comes, and again after a loss."""

    def __init__(self, address: str):
        self._address = address
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[list[Finished], Done]] = {}
        self._tickets = itertools.count()
        self._full = 0.0, EngineError("OK", "")  # until when, on the monotonic clock, and the words

    def new_ticket(self) -> int:
        return next(self._tickets)

    def submit(
        self,
        ticket: int,
        fields: Mapping[str, np.ndarray],
        done: Done,
        origin: Origin = Origin(),  # noqa: B008 (it is frozen)
    ) -> None:
        """`done` is called once, from another thread, with the images by index or the error.

        The engine's log and traces name the request by its `origin`.

        Raises:
            EngineError: the engine is not there.
        """
        layout, body = _packed(fields)
        message = _frame(
            {"ticket": ticket, "fields": layout, "origin": [origin.request_id, origin.traceparent]},
            body,
        )
        with self._lock:
            self._waiting[ticket] = ([], done)
            try:
                self._connected().sendall(message)
            except OSError:
                del self._waiting[ticket]
                text = "the engine is not there: is text_to_image_stream loaded?"
                raise EngineError("UNAVAILABLE", text) from None

    @property
    def refusal(self) -> EngineError | None:
        """What the engine would say to any request, while it is known: its queue was full."""
        until, error = self._full
        return EngineError(error.code, str(error)) if time.monotonic() < until else None

    def cancel(self, ticket: int) -> None:
        """Cancels a request; has no effect on one that has ended."""
        with self._lock, contextlib.suppress(OSError):  # the reader reports a loss
            if ticket in self._waiting and self._socket is not None:
                self._socket.sendall(_frame({"ticket": ticket}))

    def close(self) -> None:
        with self._lock:
            if self._socket is not None:
                with contextlib.suppress(OSError):  # the other side was faster
                    self._socket.shutdown(socket.SHUT_RDWR)

    def _connected(self) -> socket.socket:
        if self._socket is None:
            self._socket = _connect(self._address)
            reader = threading.Thread(target=self._read, args=[self._socket], daemon=True)
            reader.start()
        return self._socket

    def _read(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            try:
                while (frame := _read(stream, MAX_IMAGE)) is not None:
                    self._take(*frame)
            except OSError as error:  # as at the end of the stream
                log.warning("the connection to the engine is lost: %s", error)
            with self._lock:
                self._socket = None
                lost = [done for _, done in self._waiting.values()]
                self._waiting.clear()
        for done in lost:
            _deliver(done, EngineError("UNAVAILABLE", "the engine went away"))

    def _take(self, message: dict[str, Any], image: bytes) -> None:
        """Raises OSError where the message is none of an engine's."""
        ticket = message["ticket"]
        if ticket not in self._waiting:
            return  # its request could not be sent to its end
        images, done = self._waiting[ticket]
        outcome = _outcome(message, image)
        if isinstance(outcome, Finished):
            images.append(outcome)
            return
        del self._waiting[ticket]
        if outcome is not None and outcome.hold:
            self._full = time.monotonic() + outcome.hold, outcome
        _deliver(done, outcome or sorted(images, key=lambda image: image.index))


def _deliver(done: Done, outcome: list[Finished] | EngineError) -> None:
    try:
        done(outcome)
    except Exception:  # must not end the answers of others
        log.exception("answering a request failed")


def _connect(address: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
        if not _same_user(connection):
            raise PermissionError("the socket belongs to another user")
    except OSError:
        connection.close()
        raise
    return connection


def _same_user(connection: socket.socket) -> bool:
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size)
    return PEER.unpack(peer)[1] == os.getuid()


def _frame(header: dict[str, Any], body: bytes = b"") -> bytes:
    data = json.dumps(header).encode()
    return LENGTHS.pack(len(data), len(body)) + data + body


def _read(stream: Any, max_body: int) -> tuple[dict[str, Any], bytes] | None:
    """The next frame; None where the stream ends, also inside a frame.

    Raises:
        OSError: the connection is lost, or a frame is larger than allowed or cannot be read.
    """
    lengths = stream.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    header, body = LENGTHS.unpack(lengths)
    if header > MAX_HEADER or body > max_body:
        raise OSError(f"a frame of {header} and {body} bytes is too large")
    data = stream.read(header + body)
    if len(data) < header + body:
        return None
    try:
        message = json.loads(data[:header])
    except (ValueError, RecursionError):
        raise OSError("a frame's header is no JSON") from None
    if not isinstance(message, dict) or type(message.get("ticket")) is not int:
        raise OSError("a frame's header has no ticket")
    return message, data[header:]


def _submission(message: dict[str, Any], body: bytes) -> tuple[dict[str, np.ndarray], Origin]:
    """The fields and the origin of a request.

    Raises:
        OSError: the message has none that can be read.
    """
    try:
        request_id, traceparent = message["origin"]
        fields = _unpacked(message["fields"], body)
    except (KeyError, TypeError, ValueError) as error:
        raise OSError(f"a frame holds no request: {error}") from None
    if not isinstance(request_id, str) or not isinstance(traceparent, str):
        raise OSError("a frame's origin is no text")
    return fields, Origin(request_id, traceparent)


def _outcome(message: dict[str, Any], image: bytes) -> Finished | EngineError | None:
    """What an answer of the engine's says: an image, an error, or None as the end without one.

    Raises:
        OSError: the message says nothing of it.
    """
    try:
        if "error" not in message:
            warnings = tuple(message["warnings"])
            return Finished(message["index"], message["seed"], image, warnings)
        if not message["error"]:
            return None
        code, text, hold = message["error"]
        return EngineError(code, text, hold=min(float(hold), LONGEST_HOLD))
    except (KeyError, TypeError, ValueError) as error:
        raise OSError(f"a frame holds no answer: {error}") from None


def _packed(fields: Mapping[str, np.ndarray]) -> tuple[list[list], bytes]:
    """Fields as their layout, [name, type, bytes] each, and their values one after the other."""
    layout, values = [], []
    for name, tensor in fields.items():
        is_text = tensor.dtype == object
        value = tensor.reshape(-1)[0] if is_text else tensor.tobytes()
        layout.append([name, TEXT if is_text else tensor.dtype.name, len(value)])
        values.append(value)
    return layout, b"".join(values)


def _unpacked(layout: list[list], body: bytes) -> dict[str, np.ndarray]:
    """Raises TypeError or ValueError where the layout is none, or not that of the body."""
    fields: dict[str, np.ndarray] = {}
    start = 0
    for name, kind, length in layout:
        if not isinstance(name, str) or kind not in KINDS or not 0 <= length <= len(body) - start:
            raise ValueError(f"the field {name!r:.60} of {length!r:.20} bytes is {kind!r:.20}")
        value = body[start : start + length]
        fields[name] = np.array([value], object) if kind == TEXT else np.frombuffer(value, kind)
        start += length
    if start < len(body):
        raise ValueError(f"{len(body) - start} bytes belong to no field")
    return fields
