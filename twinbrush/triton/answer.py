"""One request's answers and its end, and the request counters of `/metrics`."""

from __future__ import annotations

import logging
import queue
import shutil
import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from twinbrush.engine.generation import EngineError
from twinbrush.engine.threads import Fail, start_guarded

log = logging.getLogger(__name__)
SHARED_MEMORY = "/dev/shm"
MARGIN = 2**20  # bytes that a region grows by
# Status names of the engine that Triton's Python API lacks, and the nearest that it has.
TRITON_CODES = {"RESOURCE_EXHAUSTED": "UNAVAILABLE", "DEADLINE_EXCEEDED": "CANCELLED"}
STATUS_NAMES = {"INVALID_ARG": "INVALID_ARGUMENT"}  # gRPC's, where Triton's differ
DTYPES = {"index": np.int32, "step": np.int32, "total_steps": np.int32, "seed": np.int64}


class RequestMetrics:
    """Request counters of `/metrics`; Triton itself counts every request as a success.

    One thread makes all changes, beside the requests, because the server dies of two at once. A
    server without metrics counts nothing.
    """

    def __init__(self, model: str, fail: Fail):
        self._model = model
        self._changes: queue.SimpleQueue[str | None] | None = None  # None: a request begins
        kinds = pb_utils.MetricFamily
        try:
            self._live = kinds(
                "twinbrush_requests_live", "Requests that have no end yet", kinds.GAUGE
            )
            self._ended = kinds(
                "twinbrush_requests_ended_total", "Requests by how they ended", kinds.COUNTER
            )
        except pb_utils.TritonModelException:
            log.warning("the server has no metrics: requests are not counted")
            return
        self._changes = queue.SimpleQueue()
        start_guarded("metrics", partial(self._count, self._changes), fail)

    def began(self) -> None:
        if self._changes is not None:
            self._changes.put(None)

    def ended(self, code: str) -> None:
        if self._changes is not None:
            self._changes.put(code)

    def _count(self, changes: queue.SimpleQueue) -> None:
        live, ended = self._live.Metric({"model": self._model}), {}
        while True:
            if (code := changes.get()) is None:
                live.increment(1)
                continue
            if code not in ended:
                ended[code] = self._ended.Metric({"model": self._model, "code": code})
            ended[code].increment(1)
            live.increment(-1)


class Answer:
    """The responses of one request, and exactly one end.

    Args:
        request: Triton's.
        metrics: of its model.
        streams: whether its model is decoupled: a stream's error reaches the client without its
            status, so the message begins with it.
    """

    def __init__(self, request: Any, metrics: RequestMetrics, streams: bool = False):
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
