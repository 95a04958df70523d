"""Pictures behind signed URLs that expire: kept in memory, bounded in bytes. Knows no HTTP."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class File:
    """A picture's bytes and the seconds since the epoch at which it is forgotten."""

    data: bytes
    media_type: str
    expires: int


class Files:
    """The latest pictures, by names that cannot be guessed. For one event loop.

    Args:
        most_bytes: of all files; the oldest are forgotten for new ones.
        seconds: that a file lives.
        clock: seconds since the epoch.
    """

    def __init__(self, most_bytes: int, seconds: float, clock: Callable[[], float] = time.time):
        self._most_bytes, self._seconds, self._clock = most_bytes, seconds, clock
        self._secret = secrets.token_bytes(32)
        self._files: OrderedDict[str, File] = OrderedDict()
        self._bytes = 0

    @property
    def bytes(self) -> int:
        return self._bytes

    def add(self, data: bytes, image_format: str) -> str:
        """Keeps a picture; returns its path and query, relative to the folder of files.

        Raises:
            ValueError: the picture alone is larger than all files may be.
        """
        if len(data) > self._most_bytes:
            raise ValueError(f"a picture of {len(data)} bytes; all may have {self._most_bytes}")
        self._forget()
        while self._bytes + len(data) > self._most_bytes:
            self._drop_oldest()
        name = f"{secrets.token_urlsafe(16)}.{image_format}"
        expires = int(self._clock() + self._seconds)
        self._files[name] = File(data, f"image/{image_format}", expires)
        self._bytes += len(data)
        return f"{name}?expires={expires}&signature={self._signature(name, expires)}"

    def find(self, name: str, expires: int, signature: str) -> File | None:
        """A file of a URL that this process has signed and that has not expired."""
        signed = hmac.compare_digest(self._signature(name, expires).encode(), signature.encode())
        self._forget()
        return self._files.get(name) if signed and expires > self._clock() else None

    def _signature(self, name: str, expires: int) -> str:
        return hmac.new(self._secret, f"{name} {expires}".encode(), hashlib.sha256).hexdigest()

    def _forget(self) -> None:
        """Files are in the order of their ends, because all live equally long."""
        while self._files and next(iter(self._files.values())).expires <= self._clock():
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, file = self._files.popitem(last=False)
        self._bytes -= len(file.data)
