"""A request while it lives, and the events that its client gets."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from twinbrush.engine.request import GenerationRequest, InvalidArgument

log = logging.getLogger(__name__)


class EngineError(Exception):
    """Why a request ended without its images: `code` is one of Triton's status names."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code

    @classmethod
    def of(cls, error: Exception) -> EngineError:
        """What a client is told of `error`; the log gets what nobody foresaw."""
        if isinstance(error, EngineError):
            return error
        if isinstance(error, InvalidArgument):
            return cls("INVALID_ARG", str(error))
        log.error("taking a request failed", exc_info=error)
        return cls("INTERNAL", "the server's log says why")

    @classmethod
    def of_shutdown(cls) -> EngineError:
        """Another server can be asked the same."""
        return cls("UNAVAILABLE", "the server is shutting down")


@dataclass(frozen=True)
class Progress:
    """Image `index` has had `step` of `total_steps`; `image` holds a preview or nothing."""

    index: int
    step: int
    total_steps: int
    image: bytes | None = None


@dataclass(frozen=True)
class Finished:
    """Image `index`, encoded as the request asked."""

    index: int
    seed: int
    image: bytes
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class End:
    """The last event of every request; `error` is None when all its images were sent."""

    error: EngineError | None = None


Event = Progress | Finished | End


class Generation:
    """A live request: how to answer it, what it still owes, and a way to stop it."""

    def __init__(
        self,
        request: GenerationRequest,
        warnings: tuple[str, ...],
        reply: Callable[[Event], None],
        end: Callable[[Generation, EngineError | None], None],
    ):
        self.request, self.warnings, self.reply = request, warnings, reply
        self.jobs: list[Any] = []  # the engine's, one an image
        self.images_left = request.num_images
        self.ended = False
        self._end = end

    def cancel(self) -> None:
        """Ends it before the next UNet call, in which its rows are free for others.

        From any thread, at any time; one that has ended stays as it is.
        """
        self._end(self, EngineError("CANCELLED", "the request was cancelled"))
