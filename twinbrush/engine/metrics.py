"""Every metric of the server, as data, and how the engine records it.

Names and units follow Prometheus' conventions. Label values are bounded: those of the table, or
the names of the served models. Knows no monitoring library and no Triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

CODES = (
    "OK", "INVALID_ARG", "NOT_FOUND", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED",
    "CANCELLED", "INTERNAL",
)  # fmt: skip
DOORS = ("text_to_image", "text_to_image_stream")
REASONS = (
    "invalid", "memory", "queue_full", "work_full", "client_full", "deadline", "draining", "other",
)  # fmt: skip
SIZES = ("small", "native", "2x", "4x")
STAGES = ("queue", "encode", "denoise", "decode", "encode_image")
SERVED = ()  # a label's values are the served models

SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
ROWS = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 128.0)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True, eq=False)
class Metric:
    """One metric.

    Attributes:
        name: with its unit, as Prometheus shows it.
        kind: whether a recorded value is added, replaces the last one, or is one observation.
        help: one sentence for operators, without a full stop.
        labels: each label's allowed values; `SERVED` stands for the names of the served models.
        buckets: upper bounds of a histogram.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()


class Observer(Protocol):
    """Takes what the engine records; called from many threads, and must not block."""

    def record(self, metric: Metric, value: float, *labels: str) -> None:
        """Takes one value, with the labels' values in the order of `metric.labels`."""
        ...


class Unobserved:
    """An observer that keeps nothing."""

    def record(self, metric: Metric, value: float, *labels: str) -> None:
        pass


def _counter(name: str, text: str, **labels: tuple[str, ...]) -> Metric:
    return Metric(f"twinbrush_{name}_total", "counter", text, labels)


def _gauge(name: str, text: str, **labels: tuple[str, ...]) -> Metric:
    return Metric(f"twinbrush_{name}", "gauge", text, labels)


def _histogram(name: str, text: str, buckets: tuple[float, ...], **labels: tuple) -> Metric:
    return Metric(f"twinbrush_{name}", "histogram", text, labels, buckets)


REQUESTS_LIVE = _gauge("requests_live", "Requests that have no end yet", model=DOORS)
REQUESTS_ENDED = _counter(
    "requests_ended", "Requests by the status that they ended with", model=DOORS, code=CODES
)
REQUEST_SECONDS = _histogram(
    "request_seconds", "Time from a request's admission to its end", SECONDS, code=CODES
)
REFUSALS = _counter("refusals", "Requests refused before any compute, by reason", reason=REASONS)
IMAGES = _counter("images", "Images finished, by size class", size=SIZES)
STAGE_SECONDS = _histogram(
    "stage_seconds", "Time of a finished image in each stage; the stages of an image add up to"
    " its time from admission to its file", SECONDS, stage=STAGES, size=SIZES,
)  # fmt: skip
TICK_SECONDS = _histogram(
    "tick_seconds", "Time of one turn of the denoising loop: choice, UNet call, samplers", SECONDS
)
CALL_ROWS = _histogram("unet_call_rows", "Rows of a UNet call", ROWS, size=SIZES)
CALL_FILL = _histogram(
    "unet_call_fill_ratio", "Rows of a UNet call over those that it may have", SHARES, size=SIZES
)
CALL_RETRIES = _counter("unet_call_retries", "UNet calls that failed and were tried in halves")
MODEL_SECONDS = _histogram(
    "model_call_seconds", "Time of a call of a served model", SECONDS, model=SERVED
)
MODEL_FAILURES = _counter("model_call_failures", "Calls of a model that failed", model=SERVED)
IMAGES_WAITING = _gauge("images_waiting", "Encoded images that are in no UNet call")
ROWS_WAITING = _gauge("rows_waiting", "UNet rows that they need for their next call")
WORK_OUTSTANDING = _gauge(
    "work_outstanding_rows", "Admitted work that is not done, in UNet rows at the native size"
)
WORK_LIMIT = _gauge("work_limit_rows", "Work that may be outstanding, in the same unit")
WORK_SAVED = _counter(
    "work_saved_rows", "Work not done because its request was cancelled or failed, by its status,"
    " in UNet rows at the native size", code=CODES[1:],
)  # fmt: skip
CACHE_TEXTS = _counter(
    "conditioning_cache_texts", "Prompts looked up in the conditioning cache",
    result=("hit", "miss"),
)  # fmt: skip
CACHE_BYTES = _gauge("conditioning_cache_bytes", "Bytes in the conditioning cache")
CACHE_LIMIT = _gauge("conditioning_cache_limit_bytes", "Bytes that the conditioning cache may have")
CACHED_IMAGES = _counter(
    "image_cache_images", "Images of deterministic requests looked up in the image cache",
    result=("hit", "miss"),
)  # fmt: skip
ROWS_REDUCED = _gauge(
    "unet_call_reduced_sizes", "Sizes whose UNet calls were made smaller after memory ran out"
)
MEMORY_BUDGET = _gauge("memory_budget_bytes", "Bytes that the networks and their calls may take")
MEMORY_USED = _gauge(
    "memory_used_bytes", "Bytes of that budget which the networks, the latest UNet call and the"
    " room kept for decoding take, by what export measured",
)  # fmt: skip

METRICS = (
    REQUESTS_LIVE, REQUESTS_ENDED, REQUEST_SECONDS, REFUSALS, IMAGES, STAGE_SECONDS, TICK_SECONDS,
    CALL_ROWS, CALL_FILL, CALL_RETRIES, MODEL_SECONDS, MODEL_FAILURES, IMAGES_WAITING,
    ROWS_WAITING, WORK_OUTSTANDING, WORK_LIMIT, WORK_SAVED, CACHE_TEXTS, CACHE_BYTES,
    CACHE_LIMIT, ROWS_REDUCED, CACHED_IMAGES, MEMORY_BUDGET, MEMORY_USED,
)  # fmt: skip
