"""Traces over OTLP, received by a collector that speaks the real protocol."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from harness import open_engine
from test_engine import Client, request

from twinbrush import otlp
from twinbrush.engine.tracing import Origin

proto = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """An OTLP receiver over HTTP and protobuf."""

    def __init__(self):
        self.spans, self.resources = [], []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                message = proto.ExportTraceServiceRequest.FromString(body)
                for resource in message.resource_spans:
                    collector.resources.append(resource.resource)
                    for scope in resource.scope_spans:
                        collector.spans.extend(scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def named(self, name: str) -> list:
        return [span for span in self.spans if span.name == name]


@pytest.fixture
def collector():
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


def attributes(span) -> dict:
    values = {a.key: a.value for a in span.attributes}
    return {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()}


def test_a_request_is_a_trace_with_its_stages_and_links_to_shared_calls(repository, collector):
    tracer = otlp.open_tracer({"parameters": {"otlp_endpoint": {"string_value": collector.url}}})
    engine = open_engine(repository, tracer=tracer)
    done = threading.Event()
    wanted = request(engine, num_images=2, steps=3)
    engine.submit(
        wanted, lambda e: done.set() if hasattr(e, "error") else None, Origin("mine", PARENT)
    )
    assert done.wait(30)
    cancelled = Client(engine, request(engine, steps=50, num_images=16))
    cancelled.generation.cancel()
    cancelled.wait()
    engine.close()
    tracer.close()

    root, other = sorted(collector.named("text to image"), key=lambda s: s.start_time_unix_nano)
    assert root.trace_id.hex() == PARENT.split("-")[1]
    assert root.parent_span_id.hex() == PARENT.split("-")[2]
    assert attributes(root)["request_id"] == "mine"
    assert attributes(root)["code"] == "OK"
    assert attributes(other)["code"] == "CANCELLED"
    assert other.trace_id != root.trace_id
    stages = [span for span in collector.spans if span.parent_span_id == root.span_id]
    assert sorted({span.name for span in stages}) == [
        "decode", "denoise", "encode", "encode image", "queue",
    ]  # fmt: skip
    assert len(stages) == 2 * 6
    assert all(span.trace_id == root.trace_id for span in stages)
    assert all(
        root.start_time_unix_nano <= s.start_time_unix_nano <= s.end_time_unix_nano
        for s in stages
    )  # fmt: skip
    calls = {span.span_id: span for span in collector.named("unet call")}
    for span in collector.named("denoise"):
        assert len(span.links) == 3
        linked = [calls[link.span_id] for link in span.links]
        assert [attributes(call)["requests"] for call in linked] == [2, 2, 2]
        assert span.start_time_unix_nano == linked[0].start_time_unix_nano
        assert span.end_time_unix_nano == linked[-1].end_time_unix_nano
    names = [a.value.string_value for a in collector.resources[0].attributes]
    assert "twinbrush" in names


def test_the_end_of_a_drain_waits_for_the_spans_that_are_left(collector):
    tracer = otlp.open_tracer({"parameters": {"otlp_endpoint": {"string_value": collector.url}}})
    assert tracer is not None
    tracer.call(1.0, 2.0, 4, ["a"])
    assert collector.spans == []
    until = time.monotonic() + 20
    while not tracer.flushed():
        assert time.monotonic() < until
    assert [span.name for span in collector.spans] == ["unet call"]
    tracer.close()


def test_a_collector_that_does_not_answer_holds_a_drain_for_a_while_only(monkeypatch):
    monkeypatch.setattr(otlp, "FLUSH_SECONDS", 0.5)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracer = otlp.OtlpTracer(endpoint)
        tracer.call(1.0, 2.0, 4, ["a"])
        assert not tracer.flushed()
        time.sleep(0.5)
        assert tracer.flushed()
        tracer.close()


def test_tracing_is_off_unless_an_endpoint_is_given(monkeypatch):
    monkeypatch.delenv(otlp.VARIABLE, raising=False)
    assert otlp.open_tracer({}) is None


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "http://", "ftp://a", "http://a b"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint):
    with pytest.raises(ValueError, match=r"otlp_endpoint of config.pbtxt is .*: must be a URL"):
        otlp.open_tracer({"parameters": {"otlp_endpoint": {"string_value": endpoint}}})


def test_a_missing_library_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.setenv(otlp.VARIABLE, "http://127.0.0.1:4318")
    with pytest.raises(ValueError, match=r"127.0.0.1:4318.*requirements/otel.txt"):
        otlp.open_tracer(json.loads("{}"))
