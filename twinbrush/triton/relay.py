"""The way from the unary front door's process to the engine's, a local socket.

Messages are lines of JSON; an image follows its line as bare bytes. The socket has an abstract
name, so it leaves no file behind, and both sides refuse a peer of another user. Knows neither
Triton nor diffusion.
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
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from twinbrush.engine.generation import End, EngineError, Event, Finished, Generation

log = logging.getLogger(__name__)
Submit = Callable[[dict[str, np.ndarray], Callable[[Event], None]], Generation]
Done = Callable[[list[Finished] | EngineError], None]


def relay_address() -> str:
    """The socket's name, the same in all processes that one Triton server has started."""
    processes = os.stat("/proc/self/ns/pid").st_ino  # two containers may share a network
    return f"\0twinbrush-{processes}-{os.getppid()}"


class RelayServer:
    """Takes requests from the socket to `submit`, and brings back what it replies.

    What `submit` raises is the end of its request.

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
            while (line := self.rfile.readline()).endswith(b"\n"):  # else it was cut short
                message = json.loads(line)
                ticket = message["ticket"]
                if "fields" in message:
                    self._start(ticket, message["fields"])
                elif (generation := self._live.get(ticket)) is not None:
                    generation.cancel()
        finally:
            for generation in list(self._live.values()):
                generation.cancel()

    def _start(self, ticket: int, fields: dict[str, list]) -> None:
        def reply(event: Event) -> None:
            if isinstance(event, End):
                self._live.pop(ticket, None)
            self._send(ticket, event)

        try:
            generation = self.server.submit(_arrays(fields), reply)
        except Exception as error:
            self._send(ticket, End(EngineError.of(error)))
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
                message["bytes"] = len(image)
            case End(error):
                message["error"] = error and [error.code, str(error)]
        with self._sending, contextlib.suppress(OSError):  # who has gone needs no answer
            self.wfile.write(_line(message) + image)


class RelayClient:
    """Sends requests to a `RelayServer`; connects when the first comes, and again after a loss."""

    def __init__(self, address: str):
        self._address = address
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[list[Finished], Done]] = {}
        self._tickets = itertools.count()

    def new_ticket(self) -> int:
        return next(self._tickets)

    def submit(self, ticket: int, fields: Mapping[str, np.ndarray], done: Done) -> None:
        """`done` is called once, from another thread, with the images by index or the error.

        Raises:
            EngineError: the engine is not there.
        """
        message = _line({"ticket": ticket, "fields": _lists(fields)})
        with self._lock:
            self._waiting[ticket] = ([], done)
            try:
                self._connected().sendall(message)
            except OSError:
                del self._waiting[ticket]
                text = "the engine is not there: is text_to_image_stream loaded?"
                raise EngineError("UNAVAILABLE", text) from None

    def cancel(self, ticket: int) -> None:
        """Asks for the end of a request; one that has ended stays as it is."""
        with self._lock, contextlib.suppress(OSError):  # the reader tells of a loss
            if ticket in self._waiting and self._socket is not None:
                self._socket.sendall(_line({"ticket": ticket}))

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
                while (line := stream.readline()).endswith(b"\n"):  # else it was cut short
                    self._take(json.loads(line), stream)
            except OSError:
                pass  # lost, as at the end of the stream
            finally:
                with self._lock:
                    self._socket = None
                    lost = [done for _, done in self._waiting.values()]
                    self._waiting.clear()
        for done in lost:
            _tell(done, EngineError("UNAVAILABLE", "the engine went away"))

    def _take(self, message: dict[str, Any], stream: Any) -> None:
        ticket = message["ticket"]
        images, done = self._waiting[ticket]
        if "error" not in message:
            image = stream.read(message["bytes"])
            warnings = tuple(message["warnings"])
            images.append(Finished(message["index"], message["seed"], image, warnings))
            return
        del self._waiting[ticket]
        error = message["error"]
        _tell(done, EngineError(*error) if error else sorted(images, key=lambda image: image.index))


def _tell(done: Done, outcome: list[Finished] | EngineError) -> None:
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
    layout = "3i"  # process, user, group
    size = struct.calcsize(layout)
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return struct.unpack(layout, peer)[1] == os.getuid()


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _lists(fields: Mapping[str, np.ndarray]) -> dict[str, list]:
    """Tensors for JSON: numpy's name of the type, and the values; bytes as Latin-1."""
    return {
        name: ["object", [value.decode("latin-1") for value in tensor.reshape(-1)]]
        if tensor.dtype == object
        else [tensor.dtype.name, tensor.reshape(-1).tolist()]
        for name, tensor in fields.items()
    }


def _arrays(fields: Mapping[str, list]) -> dict[str, np.ndarray]:
    return {
        name: np.array([value.encode("latin-1") for value in values], object)
        if dtype == "object"
        else np.array(values, dtype)
        for name, (dtype, values) in fields.items()
    }
