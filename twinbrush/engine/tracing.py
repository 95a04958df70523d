"""When a request's stages began, and what a trace of it holds, as plain data.

Knows no tracing library and no wire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Origin:
    """Where a request comes from.

    Attributes:
        request_id: by which logs and errors name it; an empty one is replaced by a new one.
        traceparent: the client's span, as in W3C's header of that name, or empty.
    """

    request_id: str = ""
    traceparent: str = ""


@dataclass(frozen=True)
class Stage:
    """A part of an image's time; `began` and `ended` are seconds of the monotonic clock."""

    name: str
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass
class Marks:
    """When an image's stages began, in seconds of the monotonic clock.

    Attributes:
        submitted: admission of its request.
        encoding: its texts' encoding began.
        encoded: it waits for its first UNet call.
        denoising: its first UNet call began.
        call_began: its latest UNet call began.
        denoised: its last UNet call was done.
        decoded: its pixels were there.
        finished: its file was there.
        calls: what the tracer calls its UNet calls by, where there is a tracer.
    """

    submitted: float
    encoding: float
    encoded: float
    denoising: float = 0.0
    call_began: float = 0.0
    denoised: float = 0.0
    decoded: float = 0.0
    finished: float = 0.0
    calls: list[object] = field(default_factory=list)

    def stages(self) -> tuple[Stage, ...]:
        """In their order; they follow each other without gaps. There are two of `queue`."""
        return (
            Stage("queue", self.submitted, self.encoding),
            Stage("encode", self.encoding, self.encoded),
            Stage("queue", self.encoded, self.denoising),
            Stage("denoise", self.denoising, self.denoised),
            Stage("decode", self.denoised, self.decoded),
            Stage("encode_image", self.decoded, self.finished),
        )


@dataclass(frozen=True)
class RequestTrace:
    """A request from its admission to its end.

    Attributes:
        origin: its id and its parent.
        began, ended: seconds of the monotonic clock.
        code: the status that it ended with.
        attributes: of the request, for people.
        images: the stages of each finished image, by index.
    """

    origin: Origin
    began: float
    ended: float
    code: str
    attributes: Mapping[str, str | int | float]
    images: Mapping[int, Marks]


class Tracer(Protocol):
    """Takes spans; called from many threads, and must not block."""

    def call(self, began: float, ended: float, rows: int, requests: Sequence[str]) -> object:
        """A UNet call that requests shared; returns what spans link to it by."""
        ...

    def request(self, trace: RequestTrace) -> None:
        """A request that has ended."""
        ...
