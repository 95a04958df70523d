"""Parsers on what no client of ours sends: each refuses in its own words, and none harms others."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import struct
import tempfile
import time
import uuid
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, PngImagePlugin
from test_relay import fields as fields_of_relay
from test_request import CONFIG
from typer.testing import CliRunner

from twinbrush import doors
from twinbrush.control import Beat, Control
from twinbrush.engine import images
from twinbrush.engine.fields import InvalidArgument
from twinbrush.engine.generation import EngineError
from twinbrush.engine.prompt_syntax import MAX_WEIGHT, has_syntax, parse, without_syntax
from twinbrush.engine.request import COMMANDS, FIELDS, GenerationRequest
from twinbrush.triton import incoming, relay
from twinbrush.triton.relay import RelayClient, RelayServer
from twinbrush_client import InvalidRequest, wire
from twinbrush_client.cli import app
from twinbrush_client.story import fields_of, read_story

many = settings(max_examples=300, suppress_health_check=list(HealthCheck))
LONGEST_MESSAGE = 1500  # characters, of which the names of all fields are most
LORAS = replace(CONFIG, loras=("ink", "film"), max_pixels=128 * 64)

# Any text is one with lone surrogates, controls and NUL too.
texts = st.text(st.characters(codec=None, exclude_categories=()), max_size=60) | st.sampled_from(
    ["x" * 2001, "é" * 2000, "png", "lcm", "karras", "(a:1e9)", "((((a", "ink:1,ink", "1e999"]
)
numbers = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, 1, 2, 16, 50, 51, 64, 65])
weights = st.lists(
    st.sampled_from(["(", ")", "[", "]", ":", "1.2", "-", "\\", " BREAK ", "a"]), max_size=60
).map("".join)
names = st.sampled_from([*FIELDS, *COMMANDS, "unknown", "", "prompt\0"]) | texts


def outcome(kind, call, *arguments):
    """What a call returns, or the error of a kind that it raises."""
    try:
        return call(*arguments)
    except kind as error:
        assert len(str(error)) < LONGEST_MESSAGE  # noqa: PT017
        return error


# Requests ------------------------------------------------------------------------------------


@st.composite
def tensors(draw) -> np.ndarray:
    """Of any type and shape that the server knows."""
    kind = draw(st.sampled_from(["text", "bool", "int32", "int64", "float32", "uint8"]))
    count = draw(st.sampled_from([1, 1, 1, 1, 2, 0, 3]))
    if kind == "text":
        values = [draw(texts.map(_encoded) | st.binary(max_size=40)) for _ in range(count)]
        return np.array([*values, None], object)[:count]
    if kind == "float32":
        return np.array([draw(st.floats(width=32)) for _ in range(count)], np.float32)
    return np.array([draw(numbers) for _ in range(count)], np.int64).astype(kind)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@many
@given(st.dictionaries(names, tensors(), max_size=6), st.binary(min_size=1, max_size=20))
def test_any_tensors_are_a_request_or_refused_by_name(given_tensors, prompt):
    given_tensors.setdefault("prompt", np.array([prompt], object))
    request = outcome(InvalidArgument, GenerationRequest.parse, given_tensors, LORAS)
    if isinstance(request, InvalidArgument):
        assert str(request).encode()  # it can be sent
        return
    assert request.prompt.strip()
    assert 1 <= request.steps <= 50
    assert 0 <= request.guidance_scale <= 50
    assert request.width % 16 == request.height % 16 == 0
    assert request.width * request.height <= 128 * 64
    json.dumps(request.metadata_of(0, LORAS)).encode()


@many
@given(texts | weights)
def test_any_prompt_has_sections_or_a_reason(prompt):
    sections = outcome(ValueError, parse, prompt)
    if isinstance(sections, ValueError):
        assert has_syntax(prompt)
        return
    pieces = [piece for section in sections for piece in section]
    assert all(text and abs(weight) <= MAX_WEIGHT for text, weight in pieces)
    assert without_syntax(prompt) == " ".join(
        "".join(text for text, _ in section) for section in sections
    ).strip()  # fmt: skip
    if not has_syntax(prompt):
        assert without_syntax(prompt) == prompt.strip()


def test_the_most_brackets_that_a_prompt_can_have_take_no_time():
    began = time.monotonic()
    for prompt in ("(a" * 1000, "[(" * 500 + "a" + ")]" * 500, "(" * 2000, "BREAK " * 333):
        has_syntax(prompt)
    assert time.monotonic() - began < 2


# What a request of Triton's brings -----------------------------------------------------------


def request_of(parameters, timeout=0, **inputs) -> SimpleNamespace:
    def read() -> str:
        return parameters.decode() if isinstance(parameters, bytes) else parameters

    given_inputs = [
        SimpleNamespace(name=lambda name=name: name, as_numpy=lambda value=value: value)
        for name, value in inputs.items()
    ]
    return SimpleNamespace(parameters=read, inputs=lambda: given_inputs, timeout=lambda: timeout)


values = st.none() | st.booleans() | numbers | st.floats() | texts
members = (
    st.sampled_from(["id", "traceparent", "twinbrush-client", "triton_x", "steps", ""]) | texts
)


@many
@given(
    st.dictionaries(members, values | st.lists(values), max_size=4).map(json.dumps)
    | texts
    | st.binary(max_size=40)
    | st.sampled_from(["[" * 60_000, "{}" * 2, '{"id": 1, "id": 2}', "null", "1", "x" * 70_000])
)
def test_any_parameters_are_read_or_refused_by_name(parameters):
    prompt = np.array([b"a"], object)
    request = request_of(parameters, prompt=prompt)
    found = outcome(InvalidArgument, incoming.read, request, ("prompt",))
    if isinstance(found, InvalidArgument):
        return
    fields, parent = found
    assert set(fields) <= {"prompt", "client"}
    assert fields["prompt"] is not prompt
    assert parent == "" or len(parent) == 55


@pytest.mark.parametrize(
    ("timeout", "given", "deadline"),
    [
        (0, None, None), (0, 7, 7), (5_000_000, None, 5000), (1, None, 1), (5_000_000, 0, 5000),
        (5_000_000, 7000, 5000), (5_000_000, 7, 7), (2**64 - 1, None, None), (2**64 - 1, 7, 7),
        (5_000_000, -1, -1),
    ],
)  # fmt: skip
def test_the_earlier_of_tritons_timeout_and_the_deadline_counts(timeout, given, deadline):
    inputs = {"prompt": np.array([b"a"], object)}
    if given is not None:
        inputs["deadline_ms"] = np.array([given], np.int32)
    fields, _ = incoming.read(request_of("", timeout, **inputs), tuple(FIELDS))
    found = fields.get("deadline_ms")
    assert (None if found is None else found.tolist()[0]) == deadline


def test_parameters_of_a_request_are_parsed_once(monkeypatch):
    parsed = []
    monkeypatch.setattr(incoming.json, "loads", lambda text: parsed.append(text) or {})
    incoming.read(request_of('{"traceparent": "x"}', prompt=np.array([b"a"], object)), ("prompt",))
    assert parsed == ['{"traceparent": "x"}']


@many
@given(st.dictionaries(st.just(doors.PARAMETER) | texts, values, max_size=2))
def test_no_parameters_but_the_key_open_the_networks(parameters):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(doors.VARIABLE, "secret")
        assume(parameters.get(doors.PARAMETER) != "secret")
        assert not doors.is_open(json.dumps(parameters))


# The relay -----------------------------------------------------------------------------------

json_values = st.recursive(values, lambda inner: st.lists(inner, max_size=4), max_leaves=8)
layouts = st.lists(
    st.tuples(names, st.sampled_from(["text", "int64", "bool", "float32", "O", "nonsense"]),
              st.sampled_from([0, 1, 4, 8, -1, 2**40]) | values).map(list),
    max_size=4,
)  # fmt: skip
headers = json_values | st.fixed_dictionaries(
    {},
    optional={
        "ticket": st.integers(0, 3) | json_values,
        "fields": layouts | json_values,
        "origin": st.just(["a", ""]) | json_values,
        "error": json_values,
        "index": json_values,
    },
)


@st.composite
def frames(draw) -> bytes:
    header = json.dumps(draw(headers)).encode() if draw(st.booleans()) else draw(st.binary())
    body = draw(st.binary(max_size=20))
    odd = st.sampled_from([0, 1, 2**16, 2**16 + 1, 2**32 - 1])
    lengths = (len(header), len(body)) if draw(st.integers(0, 3)) else (draw(odd), draw(odd))
    return struct.pack("<II", *lengths) + header + body


@many
@given(st.lists(frames(), max_size=3).map(b"".join) | st.binary(max_size=40))
def test_any_bytes_on_the_relay_are_requests_or_an_end(data):
    stream = io.BytesIO(data)
    while isinstance(frame := outcome(OSError, relay._read, stream, relay.MAX_REQUEST), tuple):
        outcome(OSError, relay._submission, *frame)
        outcome(OSError, relay._outcome, *frame)


BROKEN = [
    b"[]", b"null", b"[" * 60_000, b"\xff", b'{"ticket": []}', b'{"ticket": true}',
    b'{"ticket": 1, "fields": 3, "origin": ["", ""]}', b'{"ticket": 1, "fields": []}',
    b'{"ticket": 1, "fields": [["a", "O", 0]], "origin": ["", ""]}',
    b'{"ticket": 1, "fields": [["a", "text", -1]], "origin": ["", ""]}',
    b'{"ticket": 1, "fields": [["a", "text", 9]], "origin": ["", ""]}',
    b'{"ticket": 1, "fields": [], "origin": [1, 2]}',
]  # fmt: skip


def test_a_frame_that_cannot_be_read_closes_its_connection_with_one_line(caplog, capfd):
    address = f"\0twinbrush-test-{uuid.uuid4().hex}"
    server = RelayServer(address, lambda fields, reply, origin: None)
    try:
        for header in BROKEN:
            caplog.clear()
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(10)
                connection.connect(address)
                connection.sendall(relay.LENGTHS.pack(len(header), 0) + header)
                assert connection.recv(1) == b"", header
            until = time.monotonic() + 5
            while not caplog.records and time.monotonic() < until:
                time.sleep(0.001)
            lines = [record.getMessage() for record in caplog.records]
            assert len(lines) == 1
            assert lines[0].startswith("the relay has closed a connection: a frame")
    finally:
        server.close()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("answer", [{"ticket": 0}, {"ticket": 0, "error": 3}, {"ticket": "a"}, []])
def test_an_answer_that_cannot_be_read_ends_the_requests_that_wait(answer):
    address = f"\0twinbrush-test-{uuid.uuid4().hex}"
    client, ended = RelayClient(address), []
    with socket.socket(socket.AF_UNIX) as engine:
        engine.bind(address)
        engine.listen()
        client.submit(client.new_ticket(), fields_of_relay(), ended.append)
        connection, _ = engine.accept()
        with connection:
            connection.sendall(relay._frame({"ticket": 9, "error": None}))  # of nobody
            connection.sendall(relay._frame(answer))
            until = time.monotonic() + 10
            while not ended and time.monotonic() < until:
                time.sleep(0.001)
    assert [(type(error), error.code) for error in ended] == [(EngineError, "UNAVAILABLE")]


# The control folder --------------------------------------------------------------------------


def _swap_for_file(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.unlink(missing_ok=True)
    folder.write_text("in the way")


def _swap_for_folder(folder: Path) -> None:
    folder.unlink(missing_ok=True) if folder.is_file() else None
    (folder / "drain" / "inside").mkdir(parents=True, exist_ok=True)


def _remove(folder: Path) -> None:
    folder.unlink() if folder.is_file() else shutil.rmtree(folder, ignore_errors=True)


@settings(many, max_examples=50)
@given(st.lists(st.sampled_from([_remove, _swap_for_file, _swap_for_folder, None]), max_size=8))
def test_whatever_becomes_of_the_control_folder_the_engine_beats_on_and_logs_an_outage_once(steps):
    with tempfile.TemporaryDirectory() as parent, pytest.MonkeyPatch.context() as patched:
        lines = []
        patched.setattr("twinbrush.control.log", SimpleNamespace(error=lambda *a: lines.append(a)))
        folder = Path(parent) / "scratch" / "control"
        engine, launcher = Control(folder), Control(folder)
        beat, outages, lost = Beat(engine, "door", lambda: True), 0, False
        for step in [None, *steps]:
            if step is not None:
                step(folder)
            for _ in range(3):
                beat()
            outages += folder.is_file() and not lost
            lost = folder.is_file()
            if not lost:
                assert (launcher.silence() or ("", 0))[1] < 5
        assert len(lines) == outages
        assert launcher.silence() is not None


def test_a_drain_begins_also_after_the_control_folder_was_cleaned_away(tmp_path):
    folder = tmp_path / "control"
    engine, launcher = Control(folder), Control(folder)
    assert launcher.silence() is None
    beat = Beat(engine, "door", lambda: True)
    beat()
    assert launcher.silence() is not None
    shutil.rmtree(folder)
    assert launcher.silence() is not None
    launcher.request_drain()
    assert not launcher.drained
    beat()
    assert launcher.drained
    assert os.listdir(folder)


def test_a_step_of_the_machines_clock_is_neither_silence_nor_a_beat(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("twinbrush.control.time.monotonic", lambda: now[0])
    doors, launcher = Control(tmp_path), Control(tmp_path)
    for door in ("first", "second"):
        doors.beat(door)
    assert (launcher.silence() or ("", 1))[1] == 0
    for stamp in (10**9, 4 * 10**9):  # the clock goes far back, and far ahead
        now[0] += 50
        for door in ("first", "second"):
            os.utime(tmp_path / f"{door}.heartbeat", (stamp, stamp))
        assert (launcher.silence() or ("", 1))[1] == 0
    now[0] += 7
    os.utime(tmp_path / "first.heartbeat")
    assert launcher.silence() == ("second", 7)


# Pictures of others --------------------------------------------------------------------------

STORY = {"prompt": "élan (a:1.2)", "seed": 7, "steps": 3, "original_size": [64, 64]}
PICTURES = {
    name: images.encode(np.zeros((16, 16, 3), np.uint8), name, STORY)
    for name in ("png", "jpeg", "webp", "avif")
    if name in images.IMAGE_FORMATS
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_whole_picture_tells_its_story(name):
    story = read_story(io.BytesIO(PICTURES[name]))
    assert story == STORY
    assert fields_of(story) == STORY | {"original_size": (64, 64)}


@st.composite
def damaged(draw) -> bytes:
    data = bytearray(draw(st.sampled_from(list(PICTURES.values()))))
    for _ in range(draw(st.integers(1, 4))):
        where = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["cut", "flip", "insert", "drop", "repeat"])):
            case "cut":
                del data[where:]
            case "flip":
                data[where : where + 1] = draw(st.binary(min_size=1, max_size=1))
            case "insert":
                data[where:where] = draw(st.binary(max_size=8))
            case "drop":
                del data[where : where + draw(st.integers(1, 40))]
            case "repeat":
                data[where:where] = data[where : where + 40]
    return bytes(data)


@settings(many, max_examples=400)
@given(damaged() | st.binary(max_size=60))
def test_a_damaged_picture_tells_its_story_or_is_refused(data):
    story = outcome(InvalidRequest, read_story, io.BytesIO(data))
    if isinstance(story, InvalidRequest):
        assert str(story).startswith("file='picture' is invalid: ")
        return
    fields = outcome(InvalidRequest, fields_of, story)
    if not isinstance(fields, InvalidRequest):
        wire.stream_request(fields.pop("prompt"), fields)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(*chunks: bytes, side: int = 16) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )


def told(value: object) -> bytes:
    return png_of(chunk(b"tEXt", b"twinbrush\0" + json.dumps(value).encode()))


HOSTILE = {
    "a bomb of text": png_of(chunk(b"zTXt", b"twinbrush\0\0" + zlib.compress(b"a" * 10**8))),
    "a bomb of pixels": png_of(side=60_000),
    "a chunk without a text": png_of(chunk(b"iTXt", b"twinbrush")),
    "a damaged text": png_of(chunk(b"zTXt", b"twinbrush\0\0not compressed")),
    "nested JSON": png_of(chunk(b"tEXt", b"twinbrush\0" + b"[" * 500_000)),
    "a long number": png_of(chunk(b"tEXt", b"twinbrush\0" + b"9" * 100_000)),
    "a damaged EXIF": png_of(chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40)),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_picture_is_refused_in_a_line_and_at_once(data, tmp_path):
    file = tmp_path / "picture.png"
    file.write_bytes(data)
    began = time.monotonic()
    shown = CliRunner().invoke(app, ["inspect", str(file)])
    assert time.monotonic() - began < 2
    assert (shown.exit_code, shown.output.count("\n")) == (1, 1)
    assert f"file='{file}'"[:40] in shown.output


def test_exif_of_other_programs_may_hold_anything():
    for note in (7, "text", (1, 2)):
        exif, file = Image.Exif(), io.BytesIO()
        exif.get_ifd(ExifTags.IFD.Exif).update({
            ExifTags.Base.MakerNote: note, ExifTags.Base.UserComment: note,
        })  # fmt: skip
        Image.new("RGB", (8, 8)).save(file, "jpeg", exif=exif.tobytes())
        with pytest.raises(InvalidRequest, match="says nothing"):
            read_story(file)


@pytest.mark.parametrize(
    ("story", "reason"),
    [
        ({"prompt": 7}, "was not made by Twinbrush"),
        ({"prompt": "a", "steps": "many"}, "steps='many' is invalid: must be an integer"),
        ({"prompt": "a", "seed": 2**70}, "seed=1180591620717411303424 is invalid"),
        ({"prompt": "a", "guidance_scale": 10**400}, "guidance_scale=<an integer of"),
        ({"prompt": "a", "original_size": [1]}, "original_size=<list> is invalid: must be 2"),
        ({"prompt": "a", "lora": None}, "lora=None is invalid: must be text"),
        ({"seed": 7}, "was not made by Twinbrush"),
    ],
)
def test_a_picture_that_cannot_be_repeated_says_why(story, reason, tmp_path):
    file = tmp_path / "picture.png"
    file.write_bytes(told(story))
    done = CliRunner().invoke(app, ["generate", "--like", str(file), "--out", str(tmp_path / "o")])
    assert done.exit_code == 1
    assert reason in done.output


def test_a_picture_cannot_steer_the_terminal_or_break_the_json(tmp_path):
    file, info = tmp_path / "picture.png", PngImagePlugin.PngInfo()
    story = {"prompt": "a\x1b]0;title\x07\u009b2J[bold]\nb", "\x1b[2J": "\ud800"}
    info.add_text("twinbrush", json.dumps(story))
    Image.new("RGB", (8, 8)).save(file, pnginfo=info)
    shown = CliRunner().invoke(app, ["inspect", str(file)]).output
    assert shown == "prompt: a\\x1b]0;title\\x07\\x9b2J[bold]\nb\n\\x1b[2J: \\ud800\n"
    as_json = CliRunner().invoke(app, ["inspect", "--json", str(file)])
    assert (as_json.exit_code, json.loads(as_json.output)) == (0, story)


@many
@given(st.dictionaries(st.sampled_from(list(FIELDS)), values | st.lists(values, max_size=3)))
def test_the_client_sends_any_fields_or_refuses_them_by_name(fields):
    prompt = fields.pop("prompt", "a")
    outcome(InvalidRequest, wire.stream_request, prompt, fields)
