"""How a client reaches its server: channel, metadata, time left, and when to try again.

Shared by `Client` and `AsyncClient`. Knows nothing of requests.
"""

from __future__ import annotations

import math
import numbers
import os
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from types import NoneType
from typing import Any

import grpc

from twinbrush_client.certificates import credentials
from twinbrush_client.errors import (
    NothingListens,
    QueueFull,
    ServerUnavailable,
    TwinbrushError,
    error_of,
    invalid,
)

DEFAULT_ADDRESS = "127.0.0.1:8001"
TIMEOUT = 300.0  # seconds
MAX_RETRIES = 2
LONGEST = 1e9  # seconds, which is no limit; gRPC takes much longer ones for none at all
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0  # seconds
ADDRESS = re.compile(r"[^/\s]+:(\d{1,5})|(?:dns|ipv4|ipv6|unix|vsock|xds):\S+")
HEADER = re.compile(r"[A-Za-z0-9_-]+")
VALUE = re.compile(r"[ -~]+")
NOT_GRPC = "Failed parsing HTTP/2"  # in gRPC's words where a server speaks another protocol
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
# Signs of faults in gRPC's words, and what they mean.
TLS_FAULTS = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate is of no authority that is trusted here: name "
    "the file of its authority",
    "Hostname Verification": "its certificate is of another name: use the name that it has",
    "WRONG_VERSION_NUMBER": "it does not use TLS",
    "Socket closed": "it closed the connection: it may need TLS, or a certificate of the client; "
    "or the port is not that of gRPC, 8001 by default",
}
CANCELLED_HERE = ("Locally cancelled", "Channel closed")  # in gRPC's words
REFUSED = "Connection refused"  # in gRPC's words where nothing listens
FILE = (str, Path)
# Types of a connection's options, and what is allowed.
KINDS: dict[str, tuple[Any, str]] = {
    "max_retries": (numbers.Integral, "must be an integer from 0"),
    "headers": (Mapping, "must be a mapping of names to texts"),
    "tls": ((bool, *FILE), "must be True, False, or a file of certificates"),
    "cert": ((*FILE, NoneType), "must be a file"),
    "key": ((*FILE, NoneType), "must be a file"),
    "credentials": ((grpc.ChannelCredentials, NoneType), "must be gRPC's ChannelCredentials"),
    "server_name": ((str, NoneType), "must be text"),
}
OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 2000),  # a server that is back is found soon
)


@dataclass(frozen=True)
class Connection:
    """A server's address and the ways to talk to it.

    Attributes:
        address: host and port of the server's gRPC endpoint.
        timeout: seconds that a call may take in all, its retries included.
        max_retries: tries after the first where the server was full or not there.
        headers: metadata of every call, such as an API key.
        tls: True for TLS with the public authorities that gRPC knows, or a PEM file of others.
        cert, key: PEM files of the client, for servers that ask for a certificate.
        credentials: gRPC's own, in place of `tls`.
        server_name: the name that the server's certificate must have, where the address has
            another.
    """

    address: str = DEFAULT_ADDRESS
    timeout: float = TIMEOUT
    max_retries: int = MAX_RETRIES
    headers: Mapping[str, str] = field(default_factory=dict)
    tls: bool | str | Path = False
    cert: str | Path | None = None
    key: str | Path | None = None
    credentials: grpc.ChannelCredentials | None = None
    server_name: str | None = None
    closed: Event = field(default_factory=Event, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises InvalidRequest where an option has the wrong type, or gRPC would not take it."""
        _check_address(self.address)
        check_timeout(self.timeout)
        for name, (kinds, allowed) in KINDS.items():
            value = getattr(self, name)
            is_flag = isinstance(value, bool) and name == "max_retries"
            if not isinstance(value, kinds) or is_flag:
                raise invalid(name, value, allowed)
        if self.max_retries < 0:
            raise invalid("max_retries", self.max_retries, KINDS["max_retries"][1])
        for name, value in self.headers.items():
            _check_header(name, value)
        if (self.cert is None) != (self.key is None):
            given, other = ("cert", "key") if self.key is None else ("key", "cert")
            raise invalid(given, str(getattr(self, given)), f"needs {other}")
        if self.cert is not None and not self.tls:
            raise invalid("cert", str(self.cert), "needs tls")

    def channel(self, kind: Any, chosen: grpc.ChannelCredentials | None) -> Any:
        """A channel of `grpc` or of `grpc.aio`, with the connection's `channel_credentials`."""
        options = [*OPTIONS, ("grpc.enable_http_proxy", int(not self.is_loopback))]
        if chosen is None:
            return kind.insecure_channel(self.address, options)
        if self.server_name is not None:
            options += [("grpc.ssl_target_name_override", self.server_name)]
        return kind.secure_channel(self.address, chosen, options)

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """gRPC's credentials; None without TLS.

        Raises:
            InvalidRequest: a file is not what TLS needs.
            OSError: a file cannot be read.
        """
        if self.credentials is not None or not self.tls:
            return self.credentials
        authorities = None if self.tls is True else str(self.tls)
        return credentials(authorities, self.cert, self.key)

    @property
    def is_loopback(self) -> bool:
        host = self.address.removeprefix("ipv6:").removeprefix("ipv4:").removeprefix("dns:")
        return host.startswith(("localhost:", "127.", "[::1]", "unix:"))

    @property
    def metadata(self) -> list[tuple[str, str]]:
        return [(name.lower(), value) for name, value in self.headers.items()]

    def error(self, raised: Any) -> TwinbrushError:
        """The client's exception of gRPC's."""
        trailing = dict(raised.trailing_metadata() or ())
        hint = trailing.get("retry-after")
        after = float(hint) if hint and hint.replace(".", "", 1).isdecimal() else None
        text, code = str(raised.details() or ""), raised.code().name
        if NOT_GRPC in text:
            text = f"{self.address} does not speak gRPC; the gRPC port is 8001 by default"
        elif code == "UNAVAILABLE" and "failed to connect" in text:
            fault = next((fault for sign, fault in TLS_FAULTS.items() if sign in text), None)
            plain = not self.tls and self.credentials is None
            nothing_listens = REFUSED in text and self.is_loopback and plain
            text = f"no server answers at {self.address}{self._proxy()} ({fault or text})"
            if nothing_listens:
                return NothingListens(code, text, after)
        elif code == "CANCELLED" and any(sign in text for sign in CANCELLED_HERE):
            text = "the request was cancelled"
        elif code == "DEADLINE_EXCEEDED":
            text = "the request was not finished within its timeout"
        return error_of(code, text, after)

    def _proxy(self) -> str:
        names = [name for name in PROXIES if os.environ.get(name)]
        return "" if self.is_loopback or not names else f" through the proxy of {names[0]}"

    def deadline(self, timeout: float | None) -> Deadline:
        """When a call must be finished.

        Raises:
            InvalidRequest: `timeout` is no time.
            TwinbrushError: the client is closed.
        """
        if self.closed.is_set():
            raise TwinbrushError("FAILED_PRECONDITION", "the client is closed: make another one")
        if timeout is not None:
            check_timeout(timeout)
        seconds = self.timeout if timeout is None else timeout
        return Deadline(time.monotonic() + min(seconds, LONGEST))

    def pause(self, failure: TwinbrushError, attempt: int, deadline: Deadline) -> float | None:
        """Seconds before the next try, or None where there is none.

        Doubles with each attempt, and is random within a half, so that many clients do not come
        back at once; a hint of the server is the least.
        """
        if not isinstance(failure, QueueFull | ServerUnavailable) or attempt >= self.max_retries:
            return None
        longest = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
        pause = (failure.retry_after or 0.0) + longest * random.uniform(0.5, 1)
        return pause if pause < deadline.left else None


def check_timeout(value: object) -> None:
    """Raises InvalidRequest where a value is no time that a call may take."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    number: Any = value if is_number else -1
    if not 0 <= number < math.inf:
        raise invalid("timeout", value, "must be a number of seconds")


def _check_address(address: object) -> None:
    found = ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if found is None or (found[1] and not 0 < int(found[1]) < 2**16):
        allowed = "must be host:port of the server's gRPC endpoint, such as 127.0.0.1:8001"
        raise invalid("address", address, allowed)


def _check_header(name: object, value: object) -> None:
    """A fault names no value: it may be a secret."""
    if not isinstance(name, str):
        raise invalid("header", name, "must be text")
    if not HEADER.fullmatch(name) or name.lower().startswith("grpc-"):
        raise invalid(
            "header", name, "must be a name of letters, digits, - and _, without grpc- in front"
        )
    if name.lower().endswith("-bin"):
        raise invalid("header", name, "holds bytes in gRPC; only text is supported")
    if not isinstance(value, str) or not VALUE.fullmatch(value):
        raise invalid("header", name, "must have a value of printable ASCII characters")


@dataclass(frozen=True)
class Deadline:
    """A point of `time.monotonic`."""

    at: float

    @property
    def left(self) -> float:
        """Seconds; gRPC takes no negative ones."""
        return max(0.0, self.at - time.monotonic())
