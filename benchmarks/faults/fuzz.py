"""Requests that no client of ours would send: on gRPC, HTTP, in JSON and on the relay's socket.

Each must be answered: by an error of its own words, or by what it asks for. A request that the
engine answers with "the server's log says why" has met an exception that nobody foresaw.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from benchmarks.faults.serving import HOST, Serving, serving
from twinbrush.engine.request import COMMANDS, FIELDS

SEED = 20
ANSWER_SECONDS = 30.0
NO_ANSWER, UNFORESEEN = "no answer", "unforeseen"
UNFORESEEN_WORDS = ("the server's log says why", "Traceback")
SHARES = {"grpc": 0.3, "http": 0.2, "json": 0.3, "relay": 0.2}
DOORS = ("text_to_image", "text_to_image_stream")
NAMES = (*FIELDS, *COMMANDS, "unknown", "", "prompt\0", "é")
TYPES = ("BYTES", "BOOL", "INT32", "INT64", "FP32", "FP64", "UINT8", "FP16", "NONSENSE", "")
NUMPY_TYPES = {"BOOL": np.bool_, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}
TEXTS = (
    "", "a red circle", "\0", "\ud800", "é" * 300, "x" * 5000, "{}", "null", "png", "lcm", "high",
    "../../etc/passwd", "%s%n", "\r\n\r\n", "1e999", "-1", "true", "((((a:9)", "a BREAK b", "a1111",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 4, 16, 50, 51, 64, 65, 2**31 - 1, 2**31, 2**63 - 1, -(2**63), 10**30, 0.5)
ODD: tuple[Any, ...] = (None, True, [], {}, [1, 2], ["a", "b"], {"a": [None]}, float("nan"))
PARAMETERS = ("priority", "timeout", "id", "traceparent", "triton_x", "twinbrush_key", "x" * 50)


def fuzz(repository: Path, requests: int = 10_000) -> dict:
    """Random requests from a fixed seed; each must be answered, and no process may end."""
    doors: dict[str, Callable] = {"grpc": _grpc, "http": _http, "json": _json, "relay": _relay}
    with serving(repository) as server:
        before = sorted(server.tree())
        found = {
            name: doors[name](server, random.Random(SEED), round(requests * share))
            for name, share in SHARES.items()
        }
        crashes = len(set(before) - set(server.tree()))
        with server.client() as client:
            client.generate("a red circle")  # it still paints
    return {
        "requests": sum(sum(counts.values()) for counts in found.values()),
        "crashes": crashes,
        "without_an_answer": sum(counts[NO_ANSWER] for counts in found.values()),
        "unforeseen": sum(counts[UNFORESEEN] for counts in found.values()),
        "answers": {name: dict(counts.most_common()) for name, counts in found.items()},
    }


def _value(rng: random.Random) -> Any:
    pool = rng.choice((TEXTS, NUMBERS, ODD))
    if rng.random() < 0.1:
        return "".join(chr(rng.randrange(1, 0x2FFF)) for _ in range(rng.randrange(60)))
    return rng.choice(pool)


def _names(rng: random.Random) -> list[str]:
    prompt = ["prompt"] if rng.random() < 0.8 else []
    return [*prompt, *rng.choices(NAMES, k=rng.randrange(4))]


def _type(rng: random.Random, name: str, honest: bool) -> str:
    field = FIELDS.get(name)
    known = field.data_type if field and honest else rng.choice(TYPES)
    return known.replace("STRING", "BYTES")


def _of(status: str, text: str) -> str:
    """How an answer counts: its status, unless its words say that nobody foresaw the request."""
    return UNFORESEEN if any(words in text for words in UNFORESEEN_WORDS) else status


# gRPC ---------------------------------------------------------------------------------------------


def _grpc(server: Serving, rng: random.Random, count: int) -> Counter:
    answers: Counter = Counter()
    with grpc.insecure_channel(server.address) as channel:
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(count):
            try:
                answers[_grpc_answer(stub, _message(rng))] += 1
            except grpc.RpcError as error:
                code, text = error.code(), error.details() or ""  # pyright: ignore[reportAttributeAccessIssue]
                late = code == grpc.StatusCode.DEADLINE_EXCEEDED
                answers[NO_ANSWER if late else _of(code.name, text)] += 1
    return answers


def _grpc_answer(stub: Any, request: Any) -> str:
    if request.model_name == DOORS[0]:
        stub.ModelInfer(request, timeout=ANSWER_SECONDS)
        return "OK"
    told = NO_ANSWER
    for answer in stub.ModelStreamInfer(iter([request]), timeout=ANSWER_SECONDS):
        told = _of("error in a stream", answer.error_message) if answer.error_message else "OK"
    return told


def _message(rng: random.Random) -> Any:
    """A request whose tensors may lie about their names, types, shapes and sizes."""
    made: Any = service_pb2.ModelInferRequest(  # pyright: ignore[reportAttributeAccessIssue]
        model_name=rng.choice(DOORS), id=rng.choice(("", "a", "x" * 300, "\r\n"))
    )
    for name in _names(rng):
        honest = rng.random() < 0.5
        kind = _type(rng, name, honest)
        shape = [1] if honest else rng.choices((0, 1, 2, -1, 2**31, 2**62), k=rng.randrange(3))
        made.inputs.add(name=name, datatype=kind, shape=shape)
        made.raw_input_contents.append(_bytes(rng, kind))
    if rng.random() < 0.05:
        made.raw_input_contents.append(rng.randbytes(rng.randrange(100)))
    if rng.random() < 0.1:
        made.parameters[rng.choice(PARAMETERS)].int64_param = 1
    if rng.random() < 0.1:
        made.parameters[rng.choice(PARAMETERS)].string_param = rng.choice(
            ("", "é\r\n", "x" * 70_000)
        )
    return made


def _bytes(rng: random.Random, kind: str) -> bytes:
    """A tensor's content, often of its type."""
    if rng.random() < 0.2:
        return rng.randbytes(rng.randrange(40))
    if kind == "BYTES":
        text = str(_value(rng)).encode("utf-8", rng.choice(("replace", "surrogatepass")))
        lie = rng.choice((0, 0, 0, 1, -1, 2**31)) if rng.random() < 0.3 else 0
        return struct.pack("<I", max(0, len(text) + lie) % 2**32) + text
    number = rng.choice((0, 1, 2, 8, 50, 64, -1, 2**31 - 1))
    return np.array([number]).astype(NUMPY_TYPES.get(kind, np.uint8)).tobytes()


# HTTP ---------------------------------------------------------------------------------------------


def _http(server: Serving, rng: random.Random, count: int) -> Counter:
    """Requests of the inference protocol: tensors in JSON, or in bytes behind it."""

    def request() -> tuple[str, bytes, dict[str, str]]:
        path = f"/v2/models/{rng.choice((*DOORS, 'nonsense'))}/infer"
        head, body = _tensors(rng)
        if not body and rng.random() < 0.7:
            return path, _damaged(rng, head), {}
        length = len(head) if rng.random() < 0.8 else rng.choice((0, -1, 1, 2**40, "x"))
        return path, head + body, {"Inference-Header-Content-Length": str(length)}

    return _posted(server, count, request)


def _tensors(rng: random.Random) -> tuple[bytes, bytes]:
    """The JSON of a request, and the bytes of its binary tensors."""
    inputs, body, binary = [], b"", rng.random() < 0.5
    for name in _names(rng):
        honest = rng.random() < 0.5
        kind = _type(rng, name, honest)
        shape = [1] if honest else rng.choices((0, 1, 2, -1, 2**62, "x", None), k=rng.randrange(3))
        tensor = {"name": name, "datatype": kind, "shape": shape}
        if binary:
            content = _bytes(rng, kind)
            size = len(content) if honest else rng.choice((0, -1, 1, 2**40, "x", len(content)))
            tensor["parameters"] = {"binary_data_size": size}
            body += content
        else:
            tensor["data"] = [_value(rng)] if honest else _value(rng)
        inputs.append(tensor)
    made: dict[str, Any] = {"id": rng.choice(("", "a", 1, None)), "inputs": inputs}
    if rng.random() < 0.1:
        made["parameters"] = {rng.choice(PARAMETERS): _value(rng)}
    return json.dumps(made).encode(), body


def _json(server: Serving, rng: random.Random, count: int) -> Counter:
    """Bodies of `/generate` and `/generate_stream`, whose members are the fields."""

    def request() -> tuple[str, bytes, dict[str, str]]:
        path = f"/v2/models/{rng.choice(DOORS)}/{rng.choice(('generate', 'generate_stream'))}"
        return path, _damaged(rng, _members(rng)), {}

    return _posted(server, count, request)


def _members(rng: random.Random) -> bytes:
    """An object that may have a member twice."""
    members = [(name, _value(rng)) for name in rng.choices(NAMES, k=rng.randrange(5))]
    if rng.random() < 0.8:
        members.append(("prompt", rng.choice(TEXTS)))
    if rng.random() < 0.1:
        members += members[-1:]
    pairs = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in members)
    return f"{{{', '.join(pairs)}}}".encode()


def _damaged(rng: random.Random, data: bytes) -> bytes:
    """JSON that is sometimes cut, nested, has another byte, or is none."""
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


def _posted(
    server: Serving, count: int, request: Callable[[], tuple[str, bytes, dict[str, str]]]
) -> Counter:
    answers: Counter = Counter()
    connection = http.client.HTTPConnection(HOST, server.http, timeout=ANSWER_SECONDS)
    for _ in range(count):
        path, body, headers = request()
        try:
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            answers[_of(str(answer.status), answer.read().decode("utf-8", "replace"))] += 1
        except (http.client.HTTPException, OSError):
            answers[NO_ANSWER] += 1
            connection.close()
    return answers


# The relay ----------------------------------------------------------------------------------------


def _relay(server: Serving, rng: random.Random, count: int) -> Counter:
    """Frames on the socket between the two front doors.

    A whole one has an answer. One that cannot be read ends its connection.
    """
    namespace = os.stat("/proc/self/ns/pid").st_ino
    address = f"\0twinbrush-{namespace}-{server.server}"
    answers: Counter = Counter()
    for _ in range(count):
        whole = rng.random() < 0.5
        frame = _whole_frame(rng) if whole else _broken_frame(rng)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.connect(address)
            try:
                answers[_relay_answer(connection, frame, whole)] += 1
            except TimeoutError:
                answers[NO_ANSWER] += 1
    return answers


def _relay_answer(connection: socket.socket, frame: bytes, whole: bool) -> str:
    try:
        connection.sendall(frame)
        if not whole:
            connection.shutdown(socket.SHUT_WR)  # it may have promised more
        answer = connection.recv(1 << 16)
    except (BrokenPipeError, ConnectionResetError):
        answer = b""
    if answer:
        return _of("answered", answer.decode("utf-8", "replace"))
    return NO_ANSWER if whole else "closed"


def _whole_frame(rng: random.Random) -> bytes:
    """A request whose fields may have any name, type and value."""
    layout, body = [], b""
    for name in _names(rng):
        honest = rng.random() < 0.5
        kind = _type(rng, name, honest)
        content = _bytes(rng, kind)
        numpy_type = NUMPY_TYPES.get(kind)
        if numpy_type is not None:
            size = np.dtype(numpy_type).itemsize
            content = content[: len(content) // size * size]
        layout.append([name, np.dtype(numpy_type).name if numpy_type else "text", len(content)])
        body += content
    return _frame({"ticket": rng.randrange(3), "fields": layout, "origin": ["fuzz", ""]}, body)


def _broken_frame(rng: random.Random) -> bytes:
    """A frame whose header, lengths or layout are wrong."""
    body = b"".join(_bytes(rng, "BYTES") for _ in range(rng.randrange(3)))
    layout = [[rng.choice(NAMES), rng.choice(("text", "nonsense", "O")), rng.choice((2**40, -1))]]
    request = {"ticket": 0, "fields": layout, "origin": ["fuzz", ""]}
    others = (1, [], None, {"ticket": 1}, {"fields": 3, "ticket": 1}, {"id": []}, {"ticket": "a"})
    data = json.dumps(rng.choice((request, *others))).encode()
    lengths = (rng.choice((0, 1, 2**16 + 1, 2**32 - 1)), rng.choice((0, 2**32 - 1, len(body))))
    match rng.randrange(3):
        case 0:
            return struct.pack("<II", *lengths) + data + body
        case 1:
            data = rng.randbytes(20)
    return struct.pack("<II", len(data), len(body)) + data + body


def _frame(header: dict[str, Any], body: bytes) -> bytes:
    data = json.dumps(header).encode()
    return struct.pack("<II", len(data), len(body)) + data + body
