"""A live request, and the events that its client receives."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from twinbrush.engine.batcher import Claim
from twinbrush.engine.request import GenerationRequest, InvalidArgument
from twinbrush.engine.request_ids import named, request_id_of
from twinbrush.engine.tracing import Marks, Origin, RequestTrace

log = logging.getLogger(__name__)


class EngineError(Exception):
    """Why a request ended without its images.

    Attributes:
        code: a gRPC status name: INVALID_ARG, NOT_FOUND, UNAVAILABLE, RESOURCE_EXHAUSTED,
            DEADLINE_EXCEEDED, CANCELLED or INTERNAL.
        retry_after: seconds after which a retry makes sense, None where it never does.
        reason: one of `metrics.REASONS` where a request was refused.
        hold: seconds for which any other request may be refused in the same words, unread.
    """

    def __init__(
        self,
        code: str,
        message: str,
        retry_after: float | None = None,
        reason: str = "other",
        hold: float = 0.0,
    ):
        super().__init__(message)
        self.code, self.retry_after, self.reason, self.hold = code, retry_after, reason, hold

    @classmethod
    def of(cls, error: Exception, request_id: str) -> EngineError:
        """The error that a client sees; an unforeseen one goes to the log."""
        if isinstance(error, EngineError):
            return error
        if isinstance(error, InvalidArgument):
            return cls("INVALID_ARG", str(error), reason="invalid")
        log.error("taking a request failed: %s", named([request_id]), exc_info=error)
        return cls("INTERNAL", "the server's log says why")

    @classmethod
    def of_shutdown(cls) -> EngineError:
        """A retry reaches another server, or this one after its restart."""
        return cls("UNAVAILABLE", "the server is shutting down", 1.0, "draining")


@dataclass(frozen=True)
class Progress:
    """Image `index` has done `step` of `total_steps`; `image` is a preview or None."""

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
    """A live request.

    Attributes:
        request: the validated fields.
        request_id: by which logs, errors and traces name it.
        origin: the same, and the client's span.
        finished: when the stages of its finished images began, by index.
        work: its cost that is still ahead, see `Planner.work`.
        submitted: absolute seconds of the monotonic clock.
        deadline: absolute seconds of the monotonic clock, or None.
        claims: the claims of its images that are being denoised.
        images_left: images that are not yet sent.
        ended: whether its `End` is sent or on its way.
    """

    def __init__(
        self,
        request: GenerationRequest,
        work: float,
        warnings: tuple[str, ...],
        reply: Callable[[Event], None],
        end: Callable[[Generation, EngineError | None], None],
        origin: Origin = Origin(),  # noqa: B008 (it is frozen)
    ):
        self.request, self.work, self.warnings, self.reply = request, work, warnings, reply
        self.request_id = request_id_of(origin.request_id)
        self.origin = Origin(self.request_id, origin.traceparent)
        self.finished: dict[int, Marks] = {}
        self.submitted = time.monotonic()
        self.deadline: float | None = None
        self.claims: list[Claim] = []
        self.images_left = request.num_images
        self.ended = False
        self._end = end

    def cancel(self) -> None:
        """Ends the request before the next UNet call, which then has its rows for others.

        From any thread, at any time; has no effect on a request that has ended.
        """
        self._end(self, EngineError("CANCELLED", "the request was cancelled"))

    def trace(self, error: EngineError | None) -> RequestTrace:
        """The request as it ends now."""
        request = self.request
        attributes = {
            name: getattr(request, name)
            for name in ("width", "height", "steps", "num_images", "sampler", "guidance_scale",
                         "priority")
        }  # fmt: skip
        code = error.code if error else "OK"
        return RequestTrace(
            self.origin, self.submitted, time.monotonic(), code, attributes, dict(self.finished)
        )
