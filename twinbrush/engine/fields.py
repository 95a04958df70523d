"""What a request field is: its type on the wire, default, allowed values, help and front doors.

The fields themselves are rows of `request.GenerationRequest`. This module checks one value at a
time; it does not know which fields there are, nor how they depend on each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from twinbrush.engine.config import PipelineConfig

LONGEST_SHOWN = 60  # characters of a value in a message
BYTES_A_CHARACTER = 4  # of UTF-8, at most
MAX_NAME_BYTES = 256  # of a text that names something, such as a sampler


class InvalidArgument(ValueError):
    """A field of a request is invalid; the message names the field, its value, what is allowed.

    Args:
        name: the field.
        value: what came; a long value is shortened before it is formatted.
        allowed: what is allowed, without a full stop: "must be between 1 and 50".
    """

    def __init__(self, name: str, value: object, allowed: str):
        super().__init__(f"{shortened(name)}={shown(value)} is invalid: {allowed}.")

    @classmethod
    def worded(cls, message: str) -> InvalidArgument:
        """An error whose message already names field, value and what is allowed."""
        error = cls.__new__(cls)
        ValueError.__init__(error, message)
        return error


def shown(value: object) -> str:
    """`repr` of a value for a message, of bounded length and cost."""
    if isinstance(value, str | bytes):
        head = value[:LONGEST_SHOWN]
        text = head.decode("utf-8", "replace") if isinstance(head, bytes) else head
        return repr(text) + ("..." if len(value) > LONGEST_SHOWN else "")
    if isinstance(value, bool | int | float | None):
        return repr(value)
    if isinstance(value, list | tuple) and len(value) <= 8 and all(type(v) is int for v in value):
        return repr(value)
    return f"<{type(value).__name__}>"


def shortened(text: str) -> str:
    """A text for a message, of bounded length; lone surrogates as escapes."""
    head = text[:LONGEST_SHOWN].encode("utf-8", "backslashreplace").decode()
    return head if len(text) <= LONGEST_SHOWN else head + "..."


class Rule(Protocol):
    """Which values a field may have."""

    @property
    def max_bytes(self) -> int:
        """Bytes that a value may have on the wire; more are refused unread."""
        ...

    def allowed(self) -> str:
        """What is allowed, for tables of fields."""
        ...

    def check(self, name: str, value: Any, config: PipelineConfig) -> Any:
        """The value in its Python type.

        Raises:
            InvalidArgument: the value is not allowed.
        """
        ...


@dataclass(frozen=True)
class Text:
    """UTF-8 text of at most `max_characters`; a blank one only where `blank` is true."""

    max_characters: int
    blank: bool = True

    @property
    def max_bytes(self) -> int:
        return BYTES_A_CHARACTER * self.max_characters

    def allowed(self) -> str:
        least = "up to" if self.blank else "1 to"
        return f"{least} {self.max_characters} characters"

    def check(self, name: str, value: Any, config: PipelineConfig) -> str:
        text = decoded(name, value)
        if "\0" in text:
            raise InvalidArgument(name, text, "must be text without NUL characters")
        if len(text) > self.max_characters:
            allowed = f"must have at most {self.max_characters} characters; it has {len(text)}"
            raise InvalidArgument(name, text, allowed)
        if not self.blank and not text.strip():
            raise InvalidArgument(name, text, "must be text that is not empty")
        return text


@dataclass(frozen=True)
class Integer:
    """A whole number from `low` to `high`."""

    low: int
    high: int
    max_bytes: int = 8

    def allowed(self) -> str:
        return f"{self.low} to {'2⁶³−1' if self.high == 2**63 - 1 else self.high}"

    def check(self, name: str, value: Any, config: PipelineConfig) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            allowed = f"must be an integer between {self.low} and {self.high}"
            raise InvalidArgument(name, value, allowed)
        if not self.low <= value <= self.high:
            raise InvalidArgument(name, value, f"must be between {self.low} and {self.high}")
        return value


@dataclass(frozen=True)
class Number:
    """A finite number from `low` to `high`."""

    low: float
    high: float
    max_bytes: int = 8

    def allowed(self) -> str:
        return f"{self.low:g} to {self.high:g}"

    def check(self, name: str, value: Any, config: PipelineConfig) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not self.low <= value <= self.high:
            allowed = f"must be a finite number between {self.low:g} and {self.high:g}"
            raise InvalidArgument(name, value, allowed)
        return float(value)


@dataclass(frozen=True)
class Side:
    """Pixels of an image's side that the checkpoint's grid allows."""

    max_bytes: int = 8

    def allowed(self) -> str:
        return "multiples of the checkpoint's grid, up to four times its native side and 2,048"

    def check(self, name: str, value: Any, config: PipelineConfig) -> int:
        step, high = config.side_multiple, config.max_side
        if isinstance(value, bool) or not isinstance(value, int) or value % step:
            raise InvalidArgument(name, value, self._must(step, high))
        if not step <= value <= high:
            raise InvalidArgument(name, value, self._must(step, high))
        return value

    @staticmethod
    def _must(step: int, high: int) -> str:
        return f"must be a multiple of {step} between {step} and {high} pixels"


@dataclass(frozen=True)
class Pair:
    """Two whole numbers from `low` to `high`, which only checkpoints with sizes take."""

    low: int
    high: int
    max_bytes: int = 8
    count = 2

    def allowed(self) -> str:
        return f"two of {self.low} to {self.high}; of SDXL alone"

    def check(self, name: str, value: Any, config: PipelineConfig) -> tuple[int, int]:
        pair = isinstance(value, list | tuple) and len(value) == self.count
        if not pair or not all(type(v) is int and self.low <= v <= self.high for v in value):
            allowed = f"must be two integers between {self.low} and {self.high}"
            raise InvalidArgument(name, value, allowed)
        if not config.takes_sizes:
            allowed = f"is no input of {config.checkpoint}; only SDXL checkpoints have it"
            raise InvalidArgument(name, value, allowed)
        return value[0], value[1]


@dataclass(frozen=True)
class Choice:
    """One of some names."""

    names: tuple[str, ...]
    max_bytes: int = MAX_NAME_BYTES

    def allowed(self) -> str:
        return ", ".join(f"`{name}`" for name in self.names)

    def check(self, name: str, value: Any, config: PipelineConfig) -> str:
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        if text not in self.names:
            raise InvalidArgument(name, text, f"must be one of {', '.join(self.names)}")
        return text


@dataclass(frozen=True)
class Flag:
    """True or false."""

    max_bytes: int = 1

    def allowed(self) -> str:
        return "true, false"

    def check(self, name: str, value: Any, config: PipelineConfig) -> bool:
        if not isinstance(value, bool):
            raise InvalidArgument(name, value, "must be true or false")
        return value


@dataclass(frozen=True)
class FromConfig:
    """A default that depends on the checkpoint, or on chance; `text` says so in tables."""

    text: str
    value: Callable[[PipelineConfig], Any]


REQUIRED = object()  # the default of a field that every request must have


@dataclass(frozen=True)
class Field:
    """One field of a request.

    Attributes:
        name: of the input at the front doors, and everywhere else.
        data_type: Triton's: STRING, BOOL, INT32, INT64 or FP32.
        default: a value, `REQUIRED`, or a `FromConfig`.
        rule: which values are allowed.
        help: one or two sentences for tables and help texts.
        stream_only: whether only `text_to_image_stream` takes it.
    """

    name: str
    data_type: str
    default: Any
    rule: Rule
    help: str
    stream_only: bool = False

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    @property
    def count(self) -> int:
        """Elements of the tensor."""
        return getattr(self.rule, "count", 1)

    def parse(self, tensor: np.ndarray | None, config: PipelineConfig) -> Any:
        """The field's value, from a tensor of `count` elements; None takes the default.

        Raises:
            InvalidArgument: the value is not allowed.
        """
        if tensor is None:
            if self.required:
                raise InvalidArgument(self.name, None, "must be given")
            default = self.default
            return default.value(config) if isinstance(default, FromConfig) else default
        return self.rule.check(self.name, self._value(tensor), config)

    def measure(self, tensor: np.ndarray) -> None:
        """Refuses a tensor that is too large to be read, without reading it.

        Raises:
            InvalidArgument: it has more or fewer than `count` elements, or too many bytes.
        """
        value = self._value(tensor)
        if isinstance(value, str | bytes) and len(value) > self.rule.max_bytes:
            size = f"it has {len(value)} bytes"
            if isinstance(self.rule, Text):
                limit = f"must have at most {self.rule.max_characters} characters"
            else:
                limit = f"must have at most {self.rule.max_bytes} bytes"
            raise InvalidArgument(self.name, value, f"{limit}; {size}")

    def _value(self, tensor: np.ndarray) -> Any:
        if self.count == 1:
            return single(self.name, tensor)
        if tensor.size != self.count:
            raise InvalidArgument(self.name, list(tensor.shape), f"must have shape [{self.count}]")
        return tensor.reshape(-1).tolist()


def row(data_type: str, default: Any, rule: Rule, text: str, stream_only: bool = False) -> Any:
    """A row of the table: the definition of a dataclass's attribute of the field's name."""
    options = {"data_type": data_type, "default": default, "rule": rule, "help": text}
    return dataclasses.field(metadata=options | {"stream_only": stream_only})


def table(rows: type) -> Mapping[str, Field]:
    """The fields of a dataclass that is made of rows, by name."""
    return {f.name: Field(f.name, **f.metadata) for f in dataclasses.fields(rows)}


def single(name: str, tensor: np.ndarray) -> Any:
    """The one element of a tensor, as a Python value.

    Raises:
        InvalidArgument: it has none, or several.
    """
    if tensor.size != 1:
        raise InvalidArgument(name, list(tensor.shape), "must have the shape [1]")
    value = tensor.reshape(-1)[0]
    return value if tensor.dtype == object else value.item()


def decoded(name: str, value: Any) -> str:
    """A text from the wire.

    Raises:
        InvalidArgument: it is no UTF-8 text.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        raise InvalidArgument(name, value, "must be text")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        allowed = f"must be UTF-8 text; byte {error.start} is not"
        raise InvalidArgument(name, value, allowed) from None
