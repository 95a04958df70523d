"""API keys: hashed in a file or plain in an environment variable, and compared in constant time.

Knows no HTTP beyond the `Authorization` header's value.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import math
import re
import secrets
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PREFIX = "tb-"
SCHEMES = ("bearer", "basic")  # of an `Authorization` header
SHORTEST = 16  # characters: a hash without a salt needs keys that nobody can guess
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # the servers know callers by it too
NUMBER, WHOLE = ((int, float), "a number"), ((int,), "an integer")  # kinds of limits
SHA256 = re.compile(r"[0-9a-f]{64}")


class KeyFileError(ValueError):
    """A file of keys cannot be used; the message says where and why."""


@dataclass(frozen=True)
class Limits:
    """What one caller may ask for; None is no limit.

    Attributes:
        requests_per_minute: pictures' requests, on average; a minute's worth may come at once.
        concurrent: requests that may live at once.
        work: steps of pictures at the native size that may be outstanding.
    """

    requests_per_minute: float | None = None
    concurrent: int | None = None
    work: float | None = None


@dataclass(frozen=True)
class Key:
    """A caller: its name for logs and metrics, the hash of its key, and its limits."""

    name: str
    digest: str
    limits: Limits

    @property
    def client(self) -> str | None:
        """By which servers give callers shares of their queues; None is not counted."""
        return self.name if self.digest else None


class KeyRing:
    """The keys that open the doors; without any, everybody is `anonymous`."""

    def __init__(self, keys: Iterable[Key], limits: Limits):
        self._keys = tuple(keys)
        self._anonymous = Key("anonymous", "", limits)

    @property
    def required(self) -> bool:
        return bool(self._keys)

    def find(self, authorization: str | None) -> Key | None:
        """The caller of an `Authorization` header: Bearer, or Basic with the key as password.

        All keys are compared, so the time taken says nothing of which one was near.
        """
        if not self._keys:
            return self._anonymous
        presented = digest(_secret(authorization or ""))
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, presented):
                found = key
        return found

    def named(self, name: str | None) -> Key:
        """The caller of a name that has shown its key before; see `find`."""
        return next((key for key in self._keys if key.name == name), self._anonymous)


def digest(key: str) -> str:
    """SHA-256 in hexadecimal: keys are long and random, so they need no salt and no slow hash."""
    return hashlib.sha256(key.encode()).hexdigest()


def new_key() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def read_keys(path: Path, defaults: Limits) -> list[Key]:
    """The keys of a TOML file: a table a key, with `sha256` and, where they differ, its limits.

    Raises:
        KeyFileError: the file cannot be read, or an entry is wrong.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise KeyFileError(f"keys of {path}: {error}") from None
    if not tables:
        raise KeyFileError(f"keys of {path}: the file has none")
    return [_key(path, name, table, defaults) for name, table in tables.items()]


def plain_keys(text: str, defaults: Limits) -> list[Key]:
    """The keys of an environment variable, separated by commas.

    Raises:
        KeyFileError: a key is too short.
    """
    keys = [key.strip() for key in text.split(",") if key.strip()]
    for number, key in enumerate(keys, 1):
        check_length(key, f"key {number}")
    return [Key(f"key-{number}", digest(key), defaults) for number, key in enumerate(keys, 1)]


def check_distinct(keys: Iterable[Key]) -> None:
    """Raises KeyFileError where two entries have a name or a key in common."""
    names: set[str] = set()
    digests: dict[str, str] = {}
    for key in keys:
        if key.name in names:
            raise KeyFileError(f"two keys are named {key.name}")
        if other := digests.get(key.digest):
            raise KeyFileError(f"{other} and {key.name} are the same key")
        names.add(key.name)
        digests[key.digest] = key.name


def check_length(key: str, where: str) -> None:
    """Raises KeyFileError where a key could be guessed."""
    if len(key) < SHORTEST:
        raise KeyFileError(f"{where} has {len(key)} characters; at least {SHORTEST} are needed")


def _key(path: Path, name: str, table: Any, defaults: Limits) -> Key:
    where = f"keys of {path}: [{name}]"
    if not NAME.fullmatch(name):
        raise KeyFileError(f"{where} must be named by up to 64 letters, digits, - and _")
    if not isinstance(table, dict):
        raise KeyFileError(f"{where} must be a table with sha256")
    hashed = table.get("sha256")
    if not isinstance(hashed, str) or not SHA256.fullmatch(hashed.lower()):
        raise KeyFileError(f"{where} needs sha256, 64 hexadecimal digits")
    limits = {field: value for field, value in table.items() if field != "sha256"}
    for field, value in limits.items():
        if field not in vars(defaults):
            raise KeyFileError(
                f"{where} has {field}; known are sha256, {', '.join(vars(defaults))}"
            )
        kinds, allowed = WHOLE if field == "concurrent" else NUMBER
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
            raise KeyFileError(f"{where} {field}={value!r} must be {allowed} above 0")
    return Key(name, hashed.lower(), replace(defaults, **limits))


def _secret(authorization: str) -> str:
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            decoded = base64.b64decode(value, validate=True).decode()
        except ValueError:  # of base64, of UTF-8, or of a header that is not ASCII
            return ""
        return decoded.partition(":")[2]
    return value.strip() if scheme.lower() == "bearer" else ""
