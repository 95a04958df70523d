"""Traces over OTLP: a span a request, one a stage and image, and links to shared UNet calls.

Needs the packages of `requirements/otel.txt`, and only where an endpoint is set. OpenTelemetry's
own environment variables (headers, timeouts, sampling, resource) apply. Knows no Triton.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import twinbrush
from twinbrush.engine.tracing import Marks, RequestTrace, Tracer

VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
PARAMETER = "otlp_endpoint"
URL = re.compile(r"https?://[^/\s]+\S*$")
MOST_LINKS = 128  # of a span
FLUSH_SECONDS = 3.0  # that a drain waits for the collector
FLUSH_POLL_SECONDS = 0.2


def open_tracer(config: Mapping[str, Any]) -> OtlpTracer | None:
    """The tracer that a `config.pbtxt` in Triton's JSON form, or the environment, asks for.

    Raises:
        ValueError: the endpoint is no URL, or OpenTelemetry is not installed; the message says how
            to get it.
    """
    parameter = config.get("parameters", {}).get(PARAMETER, {}).get("string_value", "")
    endpoint = parameter or os.environ.get(VARIABLE, "")
    if not endpoint:
        return None
    if not URL.match(endpoint):
        text = f"{PARAMETER} of config.pbtxt" if parameter else VARIABLE
        raise ValueError(f"{text} is {endpoint!r}: must be a URL, such as http://127.0.0.1:4318")
    return OtlpTracer(endpoint)


class OtlpTracer(Tracer):
    """A `Tracer` that sends spans over OTLP (HTTP, protobuf) from a thread of its own.

    Args:
        endpoint: base URL of a collector, such as http://127.0.0.1:4318.
    """

    def __init__(self, endpoint: str):
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ValueError(
                f"traces are to be sent to {endpoint}, and {error.name} is not installed:"
                " `pip install -r requirements/otel.txt`, or unset"
                f" {VARIABLE} and the parameter {PARAMETER}"
            ) from error
        named = {"service.name": "twinbrush", "service.version": twinbrush.__version__}
        if os.environ.get("OTEL_SERVICE_NAME"):
            del named["service.name"]
        self._provider = TracerProvider(resource=Resource.create(named))
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("twinbrush", twinbrush.__version__)
        self._epoch = time.time_ns() - time.monotonic_ns()
        self._flush: threading.Thread | None = None
        self._flush_until = 0.0

    def call(self, began: float, ended: float, rows: int, requests: Sequence[str]) -> object:
        """See `Tracer.call`."""
        from opentelemetry.context import Context

        attributes = {"rows": rows, "requests": len(requests)}
        span = self._tracer.start_span(
            "unet call", Context(), attributes=attributes, start_time=self._time(began)
        )
        span.end(self._time(ended))
        return span.get_span_context()

    def request(self, trace: RequestTrace) -> None:
        """See `Tracer.request`."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {"traceparent": trace.origin.traceparent}
        parent = TraceContextTextMapPropagator().extract(carrier, Context())
        span = self._tracer.start_span(
            "text to image",
            parent,
            kind=SpanKind.SERVER,
            attributes={"request_id": trace.origin.request_id, "code": trace.code}
            | dict(trace.attributes),
            start_time=self._time(trace.began),
        )
        if trace.code != "OK":
            span.set_status(Status(StatusCode.ERROR, trace.code))
        inside = set_span_in_context(span, Context())
        for index, marks in trace.images.items():
            self._stages(inside, index, marks)
        span.end(self._time(trace.ended))

    def flushed(self) -> bool:
        """Whether all is sent, or the time for it is over; the first call begins to send it."""
        if self._flush is None:
            self._flush = threading.Thread(target=self._provider.force_flush, daemon=True)
            self._flush.start()
            self._flush_until = time.monotonic() + FLUSH_SECONDS
        self._flush.join(FLUSH_POLL_SECONDS)
        return not self._flush.is_alive() or time.monotonic() > self._flush_until

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()

    def _stages(self, inside: Any, index: int, marks: Marks) -> None:
        from opentelemetry.trace import Link

        links = [Link(context) for context in marks.calls[:MOST_LINKS]]  # type: ignore[arg-type]
        for stage in marks.stages():
            span = self._tracer.start_span(
                stage.name.replace("_", " "),
                inside,
                attributes={"image": index},
                links=links if stage.name == "denoise" else (),
                start_time=self._time(stage.began),
            )
            span.end(self._time(stage.ended))

    def _time(self, monotonic: float) -> int:
        """Nanoseconds since 1970."""
        return self._epoch + round(monotonic * 1e9)
