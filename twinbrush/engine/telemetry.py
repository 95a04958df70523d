"""What the engine tells of its work: the domain's events become values of metrics.

Knows the engine's nouns and the table of metrics; knows nothing of who reads them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np

from twinbrush.engine import metrics
from twinbrush.engine.claims import CallKey
from twinbrush.engine.config import PipelineConfig
from twinbrush.engine.metrics import Observer
from twinbrush.engine.models import Models


@dataclass
class Marks:
    """When an image's stages began, in seconds of the monotonic clock.

    Attributes:
        submitted: admission of its request.
        encoding: its texts' encoding began.
        encoded: it waits for its first UNet call.
        denoising: its first UNet call began.
        denoised: its last UNet call was done.
        decoded: its pixels were there.
    """

    submitted: float
    encoding: float
    encoded: float
    denoising: float = 0.0
    denoised: float = 0.0
    decoded: float = 0.0

    def stages(self, finished: float) -> dict[str, float]:
        """Seconds in each of `metrics.STAGES`; they add up to the image's whole time."""
        times = [getattr(self, mark.name) for mark in fields(self)] + [finished]
        spans = [after - before for before, after in pairwise(times)]
        before_encoding, encode, before_call, denoise, decode, encode_image = spans
        return {
            "queue": before_encoding + before_call,
            "encode": encode,
            "denoise": denoise,
            "decode": decode,
            "encode_image": encode_image,
        }


class Telemetry:
    """Records the engine's events.

    Args:
        observer: takes the values.
        config: of the checkpoint, whose native side divides sizes into classes.
    """

    def __init__(self, observer: Observer, config: PipelineConfig):
        self._record = observer.record
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

    def unet_call(self, key: CallKey, rows: int, capacity: int) -> None:
        size = self.size_class(key)
        self._record(metrics.CALL_ROWS, rows, size)
        self._record(metrics.CALL_FILL, min(1.0, rows / capacity), size)

    def call_retried(self) -> None:
        self._record(metrics.CALL_RETRIES, 1)

    def image_finished(self, key: CallKey, marks: Marks) -> None:
        size = self.size_class(key)
        self._record(metrics.IMAGES, 1, size)
        for stage, seconds in marks.stages(time.monotonic()).items():
            self._record(metrics.STAGE_SECONDS, seconds, stage, size)

    def request_ended(self, seconds: float, code: str, work_left: float) -> None:
        """A request's end, with the work that is no longer needed."""
        self._record(metrics.REQUEST_SECONDS, seconds, code)
        if code != "OK":
            self._record(metrics.WORK_SAVED, work_left, code)

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

    def model_called(self, model: str, seconds: float, failed: bool) -> None:
        self._record(metrics.MODEL_SECONDS, seconds, model)
        if failed:
            self._record(metrics.MODEL_FAILURES, 1, model)


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
