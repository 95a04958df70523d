"""One request's answers and its end, and the request counters of `/metrics`."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from twinbrush.engine.generation import EngineError

log = logging.getLogger(__name__)
# A model cannot set these: the message begins with the status, behind the nearest that it can set.
STAND_INS = {"RESOURCE_EXHAUSTED": "UNAVAILABLE", "DEADLINE_EXCEEDED": "CANCELLED"}
STATUS_NAMES = {"INVALID_ARG": "INVALID_ARGUMENT"}  # gRPC's, where Triton's differ
DTYPES = {"index": np.int32, "step": np.int32, "total_steps": np.int32, "seed": np.int64}


class RequestMetrics:
    """What `/metrics` tells of a model's requests; Triton itself counts each as a success.

    One thread makes all changes, beside the requests: the server dies of two at once. Without
    metrics in the server it tells nothing.
    """

    def __init__(self, model: str):
        self._model = model
        self._told: queue.SimpleQueue[str | None] | None = None  # None: a request begins
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
        self._told = queue.SimpleQueue()
        threading.Thread(target=self._count, args=[self._told], name="metrics", daemon=True).start()

    def began(self) -> None:
        if self._told is not None:
            self._told.put(None)

    def ended(self, code: str) -> None:
        if self._told is not None:
            self._told.put(code)

    def _count(self, told: queue.SimpleQueue) -> None:
        live, ended = self._live.Metric({"model": self._model}), {}
        while True:
            if (code := told.get()) is None:
                live.increment(1)
                continue
            if code not in ended:
                ended[code] = self._ended.Metric({"model": self._model, "code": code})
            ended[code].increment(1)
            live.increment(-1)


class Answer:
    """How one request is answered, by responses and exactly one end.

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
        tensors = [
            pb_utils.Tensor(name, np.array(value, DTYPES.get(name, object)).reshape(-1))
            for name, value in outputs.items()
        ]
        self._respond(pb_utils.InferenceResponse(tensors), "OK" if final else None)

    def fail(self, error: EngineError) -> None:
        stand_in = STAND_INS.get(error.code)
        status = STATUS_NAMES.get(error.code, error.code)
        text = f"{status}: {error}" if self._streams or stand_in else str(error)
        code = getattr(pb_utils.TritonError, stand_in or error.code)
        failure = pb_utils.TritonError(text, code)
        self._respond(pb_utils.InferenceResponse(error=failure), error.code)

    def end(self) -> None:
        self._respond(None, "OK")

    def cancelled(self) -> bool:
        """Whether the client has cancelled; False once answered.

        The server dies of the question when it comes after the end, hence the lock.
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
