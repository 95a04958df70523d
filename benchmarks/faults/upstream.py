"""Requests that end Triton 24.10 itself."""

from __future__ import annotations

import http.client
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from benchmarks.faults.serving import HOST, Serving, serving


def upstream(repository: Path) -> dict:
    """Two requests that end Triton 24.10 itself, and the time until it serves again."""
    with serving(repository) as server:
        found, restarts = {}, 1
        for name, send in {"http_5_mb_field": _large_field, "grpc_metadata": _metadata}.items():
            began = time.monotonic()
            with suppress(OSError, http.client.HTTPException, grpc.RpcError):
                send(server)
            time.sleep(1.0)
            ended = "starting again" in server.output.read_text()[-4000:] and (
                server.output.read_text().count("starting again") >= restarts
            )
            if ended:
                restarts += 1
                server.wait_until_ready(restarts)
            seconds = round(time.monotonic() - began - 1.0 * (not ended), 1)
            found[name] = {"server_ended": ended, "seconds_to_recover": seconds if ended else None}
    return found


def _large_field(server: Serving) -> None:
    connection = http.client.HTTPConnection(HOST, server.http, timeout=10)
    body = json.dumps({"prompt": "a", "unknown": "x" * 5_000_000})
    connection.request("POST", "/v2/models/text_to_image/generate", body)
    connection.getresponse().read()


def _metadata(server: Serving) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        message = service_pb2.ModelInferRequest(  # pyright: ignore[reportAttributeAccessIssue]
            model_name="text_to_image_stream"
        )
        for _ in range(20):
            metadata = [("triton_grpc_error", "true")]
            for _ in stub.ModelStreamInfer(iter([message]), timeout=5, metadata=metadata):
                pass
