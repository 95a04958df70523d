"""What the engine tells of its work: the domain's events become values of metrics.

Knows the engine's nouns and the table of metrics; knows nothing of who reads them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from twinbrush.engine import metrics
from twinbrush.engine.claims import CallKey
from twinbrush.engine.config import PipelineConfig
from twinbrush.engine.metrics import Observer
from twinbrush.engine.models import Models
from twinbrush.engine.tracing import Marks, RequestTrace, Tracer


class Telemetry:
    """Records the engine's events.

    Args:
        observer: takes the values.
        config: of the checkpoint, whose native side divides sizes into classes.
        tracer: takes spans, if any.
    """

    def __init__(self, observer: Observer, config: PipelineConfig, tracer: Tracer | None = None):
        self._record, self._tracer = observer.record, tracer
        self._native, self._scale = config.native_side, config.scale_factor

    def size_class(self, key: CallKey) -> str:
        """One of `metrics.SIZES`, by the longer side over the native one."""
        side = max(key.height, key.width) * self._scale
        if side <= self._native:
            return "native" if side == self._native else "small"
        return "2x" if side <= 2 * self._native else "4x"

    def refused(self, reason: str) -> None:
        self._record(metrics.REFUSALS, 1, reason if reason in metrics.REASONS else "other")

    def tick(self, seconds: float) -> None:
        self._record(metrics.TICK_SECONDS, seconds)

    def unet_call(
        self, key: CallKey, rows: int, capacity: int, images: Sequence[Marks], ids: Sequence[str]
    ) -> None:
        """A call that is done, with the images and the ids of the requests in it."""
        size = self.size_class(key)
        self._record(metrics.CALL_ROWS, rows, size)
        self._record(metrics.CALL_FILL, min(1.0, rows / capacity), size)
        if self._tracer is not None:
            span = self._tracer.call(images[0].call_began, images[0].denoised, rows, ids)
            for marks in images:
                marks.calls.append(span)

    def call_retried(self) -> None:
        self._record(metrics.CALL_RETRIES, 1)

    def image_finished(self, key: CallKey, marks: Marks) -> None:
        size = self.size_class(key)
        self._record(metrics.IMAGES, 1, size)
        seconds: dict[str, float] = dict.fromkeys(metrics.STAGES, 0.0)
        for stage in marks.stages():
            seconds[stage.name] += stage.seconds
        for name, value in seconds.items():
            self._record(metrics.STAGE_SECONDS, value, name, size)

    def request_ended(self, trace: RequestTrace, work_left: float) -> None:
        """A request's end, with the work that is no longer needed."""
        self._record(metrics.REQUEST_SECONDS, trace.ended - trace.began, trace.code)
        if trace.code != "OK":
            self._record(metrics.WORK_SAVED, work_left, trace.code)
        if self._tracer is not None:
            self._tracer.request(trace)

    def texts(self, hits: int, misses: int, cached_bytes: int) -> None:
        self._record(metrics.CACHE_TEXTS, hits, "hit")
        self._record(metrics.CACHE_TEXTS, misses, "miss")
        self._record(metrics.CACHE_BYTES, cached_bytes)

    def image_cache(self, images: int, hit: bool) -> None:
        self._record(metrics.CACHED_IMAGES, images, "hit" if hit else "miss")

    def waiting(self, images: int, rows: int) -> None:
        self._record(metrics.IMAGES_WAITING, images)
        self._record(metrics.ROWS_WAITING, rows)

    def work(self, outstanding: float, limit: float, reduced_sizes: int) -> None:
        self._record(metrics.WORK_OUTSTANDING, outstanding)
        self._record(metrics.WORK_LIMIT, limit)
        self._record(metrics.ROWS_REDUCED, reduced_sizes)

    def limits(self, cache_bytes: int, memory_bytes: float | None) -> None:
        """What does not change: the conditioning cache's bound, and the memory budget, if any."""
        self._record(metrics.CACHE_LIMIT, cache_bytes)
        if memory_bytes is not None:
            self._record(metrics.MEMORY_BUDGET, memory_bytes)

    def memory_used(self, used: float) -> None:
        """Bytes of the budget that a UNet call has taken, with all that lies beside it."""
        self._record(metrics.MEMORY_USED, used)

    def model_called(self, model: str, seconds: float, failed: bool) -> None:
        self._record(metrics.MODEL_SECONDS, seconds, model)
        self._record(metrics.MODEL_FAILURES, int(failed), model)


class ObservedModels:
    """`Models` whose calls are recorded."""

    def __init__(self, models: Models, telemetry: Telemetry):
        self._models, self._telemetry = models, telemetry

    def run(self, model: str, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """See `Models.run`."""
        started, failed = time.monotonic(), True
        try:
            outputs = self._models.run(model, inputs)
            failed = False
            return outputs
        finally:
            self._telemetry.model_called(model, time.monotonic() - started, failed)
