"""One request's answers and its end, and the request counters of `/metrics`."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from twinbrush.engine.generation import EngineError
from twinbrush.engine.metrics import REQUESTS_ENDED, REQUESTS_LIVE, Observer
from twinbrush.engine.request_ids import request_id_of

log = logging.getLogger(__name__)
SHARED_MEMORY = "/dev/shm"
MARGIN = 2**20  # bytes that a region grows by
# Status names of the engine that Triton's Python API lacks, and the nearest that it has.
TRITON_CODES = {"RESOURCE_EXHAUSTED": "UNAVAILABLE", "DEADLINE_EXCEEDED": "CANCELLED"}
STATUS_NAMES = {"INVALID_ARG": "INVALID_ARGUMENT"}  # gRPC's, where Triton's differ
DTYPES = {"index": np.int32, "step": np.int32, "total_steps": np.int32, "seed": np.int64}


class RequestMetrics:
    """Counts the requests of one front door; Triton itself counts every one as a success."""

    def __init__(self, observer: Observer, model: str):
        self._observer, self._model = observer, model
        self._live = 0
        self._lock = threading.Lock()

    def began(self) -> None:
        self._change(1)

    def ended(self, code: str) -> None:
        self._observer.record(REQUESTS_ENDED, 1, self._model, code)
        self._change(-1)

    def _change(self, count: int) -> None:
        with self._lock:
            self._live += count
            self._observer.record(REQUESTS_LIVE, self._live, self._model)


class Answer:
    """The responses of one request, and exactly one end.

    Attributes:
        request_id: the client's, or one that is made here; logs and errors name it.

    Args:
        request: Triton's.
        metrics: of its model.
        streams: whether its model is decoupled: a stream's error reaches the client without its
            status, so the message begins with it.
    """

    def __init__(self, request: Any, metrics: RequestMetrics, streams: bool = False):
        self.request_id = request_id_of(request.request_id())
        self._streams = streams
        self._sender = request.get_response_sender()
        self._open = True
        self._lock = threading.Lock()
        self._metrics = metrics
        metrics.began()

    def send(self, outputs: Mapping[str, Any], final: bool = False) -> None:
        """Sends one response.

        Raises:
            EngineError: UNAVAILABLE, when shared memory has no room for it.
        """
        _check_shared_memory(outputs)
        tensors = [
            pb_utils.Tensor(name, np.array(value, DTYPES.get(name, object)).reshape(-1))
            for name, value in outputs.items()
        ]
        self._respond(pb_utils.InferenceResponse(tensors), "OK" if final else None)

    def fail(self, error: EngineError) -> None:
        """Sends an error as the end.

        The message begins with the status where clients do not see it otherwise: in streams, and
        where Triton lacks the code.
        """
        code = TRITON_CODES.get(error.code, error.code)
        status = STATUS_NAMES.get(error.code, error.code)
        shown = self._streams or code != error.code
        text = f"{status}: {error}" if shown else str(error)
        text += f" (request id {self.request_id})"
        failure = pb_utils.TritonError(text, getattr(pb_utils.TritonError, code))
        self._respond(pb_utils.InferenceResponse(error=failure), error.code)

    def end(self) -> None:
        self._respond(None, "OK")

    def cancelled(self) -> bool:
        """Whether the client has cancelled; False once answered.

        The lock is needed: the server dies when the sender is asked after its end.
        """
        with self._lock:
            return self._open and self._sender.is_cancelled()

    def _respond(self, response: Any, ends_with: str | None) -> None:
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if ends_with else 0
        with self._lock:
            ends = self._open and ends_with
            self._open = self._open and not ends_with
            try:
                self._sender.send(response, flags=flags)
            except Exception:
                if ends:
                    self._metrics.ended("INTERNAL")
                raise
        if ends:
            self._metrics.ended(ends)


_largest_sent = 0  # bytes; the process's region of shared memory has had room for as much


def _check_shared_memory(outputs: Mapping[str, Any]) -> None:
    """Refuses a response that the process's shared memory can hardly hold.

    The server closes a sender before it finds that it has no room, so the request would never end.
    A region does not shrink: whatever has been sent before still fits when `/dev/shm` is full.
    """
    global _largest_sent
    images = outputs.get("image", b"")
    size = sum(map(len, images)) if isinstance(images, list) else len(images)
    if size <= _largest_sent:
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if size + MARGIN > free:
        text = f"the images take {size / 1e6:.0f} MB of shared memory, of which {free / 1e6:.0f} MB"
        text += f" are free in {SHARED_MEMORY}: ask for fewer or smaller images, or give the"
        text += " server's container more with --shm-size"
        raise EngineError("UNAVAILABLE", text)
    _largest_sent = size
