"""Requests that no client of ours would send: on gRPC, HTTP and the relay's socket."""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from benchmarks.faults.serving import HOST, Serving, serving
from twinbrush.engine.request import COMMANDS, FIELDS

SEED = 20
ANSWER_SECONDS = 30.0
DOORS = ("text_to_image", "text_to_image_stream")
NAMES = (*FIELDS, *COMMANDS, "unknown", "", "prompt\0", "é")
TYPES = ("BYTES", "BOOL", "INT32", "INT64", "FP32", "FP64", "UINT8", "FP16", "NONSENSE", "")
TEXTS = (
    "", "a red circle", "\0", "\ud7ff", "é" * 300, "x" * 5000, "{}", "null", "png", "lcm", "high",
    "../../etc/passwd", "%s%n", "\r\n\r\n", "1e999", "-1", "true",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 4, 16, 50, 51, 64, 65, 2**31 - 1, 2**31, 2**63 - 1, -(2**63), 10**30, 0.5)
ODD: tuple[Any, ...] = (None, True, [], {}, [1, 2], ["a", "b"], {"a": [None]}, float("nan"))


def fuzz(repository: Path, requests: int = 10_000) -> dict:
    """Random requests from a fixed seed; each must be answered, and no process may end."""
    shares = {"grpc": 0.35, "http": 0.35, "relay": 0.3}
    doors: dict[str, Callable] = {"grpc": _grpc, "http": _http, "relay": _relay}
    with serving(repository) as server:
        before = sorted(server.tree())
        found = {
            name: doors[name](server, random.Random(SEED), round(requests * share))
            for name, share in shares.items()
        }
        crashes = len(set(before) - set(server.tree()))
        with server.client() as client:
            client.generate("a red circle")  # it still paints
    return {
        "requests": sum(sum(counts.values()) for counts in found.values()),
        "crashes": crashes,
        "without_an_answer": sum(counts["no answer"] for counts in found.values()),
        "answers": {name: dict(counts.most_common()) for name, counts in found.items()},
    }


def _value(rng: random.Random) -> Any:
    pool = rng.choice((TEXTS, NUMBERS, ODD))
    if rng.random() < 0.1:
        return "".join(chr(rng.randrange(1, 0x2FFF)) for _ in range(rng.randrange(60)))
    return rng.choice(pool)


# gRPC ---------------------------------------------------------------------------------------------


def _grpc(server: Serving, rng: random.Random, count: int) -> Counter:
    answers: Counter = Counter()
    with grpc.insecure_channel(server.address) as channel:
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(count):
            request = _message(rng)
            try:
                if request.model_name == DOORS[0]:
                    stub.ModelInfer(request, timeout=ANSWER_SECONDS)
                else:
                    for answer in stub.ModelStreamInfer(iter([request]), timeout=ANSWER_SECONDS):
                        if answer.error_message:
                            break
                answers["answered"] += 1
            except grpc.RpcError as error:
                code = error.code()  # pyright: ignore[reportAttributeAccessIssue]
                late = code == grpc.StatusCode.DEADLINE_EXCEEDED
                answers["no answer" if late else code.name] += 1
    return answers


def _message(rng: random.Random) -> Any:
    """A request whose tensors may lie about their names, types, shapes and sizes."""
    made: Any = service_pb2.ModelInferRequest(  # pyright: ignore[reportAttributeAccessIssue]
        model_name=rng.choice(DOORS), id=rng.choice(("", "a", "x" * 300, "\r\n"))
    )
    names = [*(["prompt"] if rng.random() < 0.8 else []), *rng.choices(NAMES, k=rng.randrange(4))]
    for name in names:
        honest = rng.random() < 0.5
        field = FIELDS.get(name)
        kind = (field.data_type if field and honest else rng.choice(TYPES)).replace(
            "STRING", "BYTES"
        )
        shape = [1] if honest else rng.choices((0, 1, 2, -1, 2**31, 2**62), k=rng.randrange(3))
        made.inputs.add(name=name, datatype=kind, shape=shape)
        made.raw_input_contents.append(_bytes(rng, kind))
    if rng.random() < 0.05:
        made.raw_input_contents.append(rng.randbytes(rng.randrange(100)))
    if rng.random() < 0.1:
        made.parameters[rng.choice(("priority", "timeout", "x" * 50, "é"))].int64_param = 1
    return made


def _bytes(rng: random.Random, kind: str) -> bytes:
    if rng.random() < 0.2:
        return rng.randbytes(rng.randrange(40))
    value = _value(rng)
    if kind == "BYTES":
        text = str(value).encode("utf-8", "replace")
        lie = rng.choice((0, 0, 0, 1, -1, 2**31)) if rng.random() < 0.3 else 0
        return struct.pack("<I", max(0, len(text) + lie) % 2**32) + text
    types = {"BOOL": bool, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}
    number = rng.choice((0, 1, 2, 8, 50, 64, -1, 2**31 - 1))
    return np.array([number]).astype(types.get(kind, np.uint8)).tobytes()


# HTTP ---------------------------------------------------------------------------------------------


def _http(server: Serving, rng: random.Random, count: int) -> Counter:
    answers: Counter = Counter()
    connection = http.client.HTTPConnection(HOST, server.http, timeout=ANSWER_SECONDS)
    for _ in range(count):
        door, verb = rng.choice(DOORS), rng.choice(("generate", "generate_stream", "infer"))
        try:
            connection.request("POST", f"/v2/models/{door}/{verb}", _body(rng))
            answer = connection.getresponse()
            answer.read()
            answers[str(answer.status)] += 1
        except TimeoutError:
            answers["no answer"] += 1
            connection.close()
        except (http.client.HTTPException, OSError):
            answers["closed"] += 1
            connection.close()
    return answers


def _body(rng: random.Random) -> bytes:
    """JSON with fields of any kind, sometimes cut, repeated, nested, or no JSON at all."""
    fields = {name: _value(rng) for name in rng.choices(NAMES, k=rng.randrange(5))}
    if rng.random() < 0.8:
        fields["prompt"] = rng.choice(TEXTS)
    data = json.dumps(fields).encode()
    damage = rng.random()
    if damage < 0.1:
        return data[: rng.randrange(len(data) + 1)]
    if damage < 0.15:
        return rng.randbytes(rng.randrange(200))
    if damage < 0.2:
        return b"[" * rng.randrange(1, 90) + data
    if damage < 0.25:
        position = rng.randrange(len(data))
        return data[:position] + rng.randbytes(1) + data[position + 1 :]
    return data


# The relay ----------------------------------------------------------------------------------------


def _relay(server: Serving, rng: random.Random, count: int) -> Counter:
    """Frames on the socket between the two front doors; each ends in an answer or a close."""
    namespace = os.stat("/proc/self/ns/pid").st_ino
    address = f"\0twinbrush-{namespace}-{server.server}"
    answers: Counter = Counter()
    for _ in range(count):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.connect(address)
            try:
                connection.sendall(_frame(rng))
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(1 << 16)
                answers["answered" if answer else "closed"] += 1
            except TimeoutError:
                answers["no answer"] += 1
            except OSError:
                answers["closed"] += 1
    return answers


def _frame(rng: random.Random) -> bytes:
    """A frame whose header, lengths and values may be wrong."""
    body = b"".join(_bytes(rng, "BYTES") for _ in range(rng.randrange(3)))
    layout = [
        [rng.choice(NAMES), rng.choice(("text", "int64", "bool", "float32", "nonsense", "O")),
         rng.choice((0, 1, 4, 8, len(body), 2**40, -1))]
        for _ in range(rng.randrange(4))
    ]  # fmt: skip
    header: Any = {
        "ticket": rng.choice((0, 1, None, "a")),
        "fields": layout,
        "origin": ["fuzz", ""],
    }
    if rng.random() < 0.3:
        header = rng.choice((1, [], None, {"ticket": 1}, {"fields": 3, "ticket": 1}, {"id": []}))
    data = rng.randbytes(20) if rng.random() < 0.1 else json.dumps(header).encode()
    lengths = (len(data), len(body))
    if rng.random() < 0.2:
        lengths = (rng.choice((0, 1, 2**16 + 1, 2**32 - 1)), rng.choice((0, 2**32 - 1, len(body))))
    return struct.pack("<II", *lengths) + data + body


# Faults of the server itself ----------------------------------------------------------------------


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
            model_name=DOORS[1]
        )
        for _ in range(20):
            metadata = [("triton_grpc_error", "true")]
            for _ in stub.ModelStreamInfer(iter([message]), timeout=5, metadata=metadata):
                pass
