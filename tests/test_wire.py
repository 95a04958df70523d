"""Both front doors of the real server, over gRPC and HTTP."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import itertools
import json
import queue
import random
import shutil
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request

import numpy as np
import pytest
import tritonclient.grpc as grpc
from PIL import Image
from tritonclient.utils import InferenceServerException

from twinbrush.engine.generation import EngineError
from twinbrush_client.fields import DATA_TYPES
from twinbrush_client.wire import NUMPY_TYPES, inputs

UNARY, STREAM = "text_to_image", "text_to_image_stream"
PICTURE = {"prompt": "a red circle", "image_format": "png"}


def infer(server, model=UNARY, timeout=60, **fields):
    client = grpc.InferenceServerClient(server.address)
    return client.infer(model, inputs(PICTURE | fields), client_timeout=timeout)


def stream(server, request_id="", on_answer=None, raw=None, **fields):
    """All events of one request: (name -> value) each, then an error text or None."""
    answers: queue.SimpleQueue = queue.SimpleQueue()
    with grpc.InferenceServerClient(server.address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer(
            STREAM, raw or inputs(PICTURE | fields), request_id=request_id,
            enable_empty_final_response=True,
        )  # fmt: skip
        events: list[dict] = []
        while True:
            result, error = answers.get(timeout=60)
            if error is not None:
                return events, error.message()
            response = result.get_response()
            if response.outputs:
                names = [output.name for output in response.outputs]
                events.append({name: result.as_numpy(name)[0] for name in names})
                if on_answer:
                    on_answer(client, events)
            if response.parameters["triton_final_response"].bool_param:
                return events, None


def post(server, path, **fields):
    fields = {"prompt": "a red circle"} | fields
    body = json.dumps({name: value for name, value in fields.items() if value is not None})
    request = urllib.request.Request(f"{server.url}/v2/models/{path}", body.encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def png(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_unary_grpc_gives_all_images_with_their_seeds(server):
    result = infer(server, seed=5, num_images=3)
    assert result.as_numpy("seed").tolist() == [5, 6, 7]
    assert [png(image).shape for image in result.as_numpy("image")] == [(32, 32, 3)] * 3
    assert result.as_numpy("warning").tolist() == [b""]


def test_all_formats_hold_the_same_picture(server):
    raw, from_png, base, jpeg = (
        infer(server, seed=5, image_format=f).as_numpy("image")[0]
        for f in ("raw", "png", "png_base64", "jpeg")
    )
    pixels = np.frombuffer(raw, np.uint8).reshape(32, 32, 3)
    assert np.abs(png(from_png).astype(int) - pixels).max() <= 1
    assert np.abs(png(base64.b64decode(base)).astype(int) - pixels).max() <= 1
    assert jpeg.startswith(b"\xff\xd8")


def test_http_generate_gives_base64(server):
    answer = json.loads(post(server, f"{UNARY}/generate", seed=5, image_format="png_base64"))
    assert answer["seed"] == 5
    direct = infer(server, seed=5).as_numpy("image")[0]
    assert np.abs(png(base64.b64decode(answer["image"])).astype(int) - png(direct)).max() <= 1


def test_http_without_a_format_is_json_with_a_picture(server):
    """Raw bytes in a JSON string are what no parser reads."""
    answer = json.loads(post(server, f"{UNARY}/generate", seed=5))
    assert png(base64.b64decode(answer["image"])).shape == (32, 32, 3)
    text = post(server, f"{STREAM}/generate_stream", progress=False, preview_every=2, steps=3)
    events = [json.loads(line[5:]) for line in text.splitlines() if line.startswith("data:")]
    assert [event["event"] for event in events] == ["preview", "image"]
    for event in events:
        assert png(base64.b64decode(event["image"])).ndim == 3


def test_a_server_describes_itself_over_grpc_and_http(server):
    wanted = grpc.InferInput("info", [1], "BOOL")
    wanted.set_data_from_numpy(np.array([True]))
    (event,), error = stream(server, raw=[wanted])
    assert (error, event["event"]) == (None, b"info")
    info = json.loads(event["info"])
    assert info["defaults"]["image_format"] == "png_base64"
    assert info["sizes"] == {"native": 32, "multiple_of": 8, "largest": 128, "max_pixels": None}
    assert [field["name"] for field in info["fields"]] == list(DATA_TYPES)
    answer = post(server, f"{STREAM}/generate", prompt=None, info=True)
    assert json.loads(json.loads(answer)["info"]) == info


@pytest.mark.parametrize(
    ("fields", "value"), [({"info": False}, "False"), ({"info": True, "steps": 3}, "True")]
)
def test_info_is_alone_in_its_request(server, fields, value):
    with pytest.raises(urllib.error.HTTPError) as error:
        post(server, f"{STREAM}/generate", prompt=None, **fields)
    assert (
        f"info={value} is invalid: must be true and the only input" in error.value.read().decode()
    )


def test_huge_inputs_are_refused_by_name_and_size(server):
    """By both doors, before they are copied, decoded or passed on."""
    text = "x" * 10_000_000
    for fields in ({"prompt": text}, {"sampler": text}):
        (name,) = fields
        message = f"{name}='x{{60}}'... is invalid: must have at most .*; it has 10000000 bytes"
        with pytest.raises(InferenceServerException, match=message):
            infer(server, **fields)
        assert f"{name}='xxx" in stream(server, **fields)[1]
    with pytest.raises(urllib.error.HTTPError) as error:
        post(server, f"{UNARY}/generate", wdith=text[:1_000_000])
    assert "parameters='" in (body := error.value.read().decode())
    assert len(body) < 500


def test_http_generate_stream_tells_every_event(server):
    text = post(server, f"{STREAM}/generate_stream", steps=3, image_format="png_base64",
                preview_every=2)  # fmt: skip
    events = [json.loads(line[5:]) for line in text.splitlines() if line.startswith("data:")]
    assert [event["event"] for event in events] == ["progress", "preview", "progress", "image"]
    assert png(base64.b64decode(events[-1]["image"])).shape == (32, 32, 3)


def test_the_stream_tells_progress_previews_and_images(server):
    events, error = stream(server, steps=4, num_images=2, preview_every=2, seed=9)
    assert error is None
    mine = [event for event in events if event["index"] == 1]
    assert [e["event"] for e in mine] == [b"progress", b"preview", b"progress", b"progress",
                                          b"image"]  # fmt: skip
    assert [e["step"] for e in mine[:-1]] == [1, 2, 3, 4]
    assert png(mine[1]["image"]).shape == (8, 8, 3)
    assert mine[-1]["seed"] == 10


def test_progress_can_be_left_out(server):
    events, _ = stream(server, progress=False)
    assert [event["event"] for event in events] == [b"image"]


BAD = [
    ({"prompt": ""}, "prompt='' is invalid"),
    ({"prompt": "x" * 3000}, "at most 2000 characters"),
    ({"prompt": "a\0b"}, "NUL"),
    ({"prompt": b"\xff\xfe"}, "UTF-8"),
    ({"steps": 0}, "steps=0 is invalid: must be between 1 and 50"),
    ({"steps": -1}, "steps=-1"),
    ({"steps": 10_000}, "steps=10000"),
    ({"width": 0}, "width=0"),
    ({"width": 33}, "a multiple of 8 between 8 and 128 pixels"),
    ({"height": 1 << 20}, "height=1048576"),
    ({"seed": -1}, "seed=-1"),
    ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
    ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
    ({"sampler": "dpm_fast"}, "one of lcm, ddim, euler, dpmpp_2m"),
    ({"image_format": "gif"}, "one of png, jpeg, webp, avif, raw, png_base64"),
    ({"num_images": 0}, "num_images=0"),
    ({"num_images": 1000}, "num_images=1000 is invalid: must be between 1 and 16"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[str(f)[:32] for f, _ in BAD])
def test_bad_input_names_field_value_and_what_is_allowed(server, fields, message):
    with pytest.raises(InferenceServerException, match=message) as error:
        infer(server, **fields)
    assert error.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert "Traceback" not in str(error.value)
    events, text = stream(server, **fields)
    assert events == []
    assert message in text


@pytest.mark.parametrize("name", DATA_TYPES)
def test_a_wrong_type_or_shape_of_any_input_is_refused_by_name(server, name):
    client = grpc.InferenceServerClient(server.address)
    data_type = DATA_TYPES[name]
    tensors = []
    for kind, array in (
        ("FP64", np.zeros(1, np.float64)),
        (data_type, np.array([b"a"] * 3 if data_type == "BYTES" else [1] * 3,
                             NUMPY_TYPES[data_type])),
    ):  # fmt: skip
        tensor = grpc.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    prompt = inputs({"prompt": "a red circle"}) if name != "prompt" else []
    for tensor in tensors:
        if name not in ("progress", "preview_every"):
            with pytest.raises(InferenceServerException, match=f"'{name}'") as error:
                client.infer(UNARY, [*prompt, tensor])
            assert error.value.status() == "StatusCode.INVALID_ARGUMENT"
        assert f"'{name}'" in stream(server, raw=[*prompt, tensor])[1]


def test_an_unknown_input_is_refused_by_name(server):
    client = grpc.InferenceServerClient(server.address)
    tensor = grpc.InferInput("wdith", [1], "INT32")
    tensor.set_data_from_numpy(np.array([64], np.int32))
    raw = [*inputs({"prompt": "a red circle"}), tensor]
    with pytest.raises(InferenceServerException, match="'wdith'"):
        client.infer(UNARY, raw)
    assert "'wdith'" in stream(server, raw=raw)[1]


def test_what_only_the_stream_takes_is_not_offered_by_the_unary_door(server):
    with pytest.raises(urllib.error.HTTPError) as error:
        post(server, f"{UNARY}/generate", preview_every=2)
    text = error.value.read().decode()
    assert "preview_every=2 is invalid: is no input; the inputs are prompt, " in text
    assert "preview_every" not in text.partition("the inputs are")[2]


@pytest.mark.parametrize(
    ("fields", "word"),
    # Triton reads the JSON before a model sees it, and its number errors name no field.
    [({"seed": 2**63}, "as signed-integer"), ({"steps": "many"}, "JSON"), ({"wdith": 3}, "wdith")],
)
def test_bad_json_is_refused_by_name(server, fields, word):
    with pytest.raises(urllib.error.HTTPError) as error:
        post(server, f"{UNARY}/generate", **fields)
    assert error.value.code in (400, 500)  # Triton's own JSON errors are a 500
    assert word in error.value.read().decode()


def test_a_truncated_prompt_is_reported(server):
    warning = infer(server, prompt="very " * 30 + "red").as_numpy("warning")[0].decode()
    assert "truncated to the 16 of clip_text" in warning


# Some seconds of work: pictures so large that the two rows of one image fill a UNet call.
SLOW = {"steps": 50, "num_images": 16, "width": 128, "height": 128}
SLOW_CALLS = 50 * 16


def unet_calls(server) -> int:
    client = grpc.InferenceServerClient(server.address)
    return client.get_inference_statistics("unet").model_stats[0].inference_stats.success.count


def wait_for_a_call(server, after: int) -> None:
    until = time.monotonic() + 30
    while unet_calls(server) == after:
        assert time.monotonic() < until
        time.sleep(0.01)


@contextlib.contextmanager
def work_stops(server):
    """Within, a `SLOW` request is left; the UNet comes to rest long before it can be done."""
    before = unet_calls(server)
    yield before
    until = time.monotonic() + 30
    seen, now = -1, unet_calls(server)
    while seen != now:
        assert time.monotonic() < until, "the UNet is still being called"
        time.sleep(0.5)
        seen, now = now, unet_calls(server)
    assert now - before < SLOW_CALLS / 4


def test_slow_work_is_as_slow_as_it_is_said_to_be(server):
    before = unet_calls(server)
    stream(server, **SLOW | {"num_images": 2})
    assert unet_calls(server) - before == SLOW_CALLS / 8


def test_a_cancelled_stream_stops_the_work(server):
    def stop_early(client, events):
        if len(events) == 3:
            client.stop_stream(cancel_requests=True)

    with work_stops(server):
        _, error = stream(server, **SLOW, on_answer=stop_early)
        assert "cancel" in error.lower()


def test_a_cancelled_unary_request_stops_the_work(server):
    with work_stops(server) as before:
        answers: queue.SimpleQueue = queue.SimpleQueue()
        client = grpc.InferenceServerClient(server.address)
        call = client.async_infer(
            UNARY,
            inputs({"prompt": "a red circle", **SLOW}),
            lambda result, error: answers.put(error),
        )
        wait_for_a_call(server, before)
        call.cancel()
        assert "CANCELLED" in answers.get(timeout=60).status()


def test_a_deadline_stops_the_work(server):
    with work_stops(server), pytest.raises(InferenceServerException, match="Deadline Exceeded"):
        infer(server, **SLOW, timeout=0.3)


@pytest.mark.parametrize("ask", ["client.generate({})", "list(client.stream({}))"])
def test_a_client_that_is_killed_stops_the_work(server, ask):
    with work_stops(server) as before:
        code = "from twinbrush_client import Client; client = Client({!r}); " + ask
        arguments = "'a red circle', **" + repr(SLOW)
        process = subprocess.Popen([sys.executable, "-c", code.format(server.address, arguments)])
        wait_for_a_call(server, before)
        process.kill()
        process.wait()


def metrics(server) -> dict[str, float]:
    """Twinbrush's own of `/metrics`: values by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics}/metrics", timeout=10) as answer:
        lines = [line for line in answer.read().decode().splitlines() if line[:9] == "twinbrush"]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def settled(read):
    """What `read` returns once the values of former requests, written in turns, have arrived."""
    for _ in range(60):
        found = read()
        time.sleep(1)
        if read() == found:
            return found
    raise AssertionError("values change for longer than a minute")


def test_metrics_tell_how_requests_ended_and_how_many_live(server):
    def live(model):
        return metrics(server)[f'twinbrush_requests_live{{model="{model}"}}']

    def ended():
        found = metrics(server)
        codes = itertools.product((UNARY, STREAM), ("OK", "INVALID_ARG", "CANCELLED"))
        names = [f'{{code="{code}",model="{model}"}}' for model, code in codes]
        return [found.get(f"twinbrush_requests_ended_total{name}", 0) for name in names]

    def becomes(expected, read):
        """They are counted beside the requests, within moments."""
        until = time.monotonic() + 30
        while read() != expected and time.monotonic() < until:
            time.sleep(0.01)
        return read() == expected

    def both_live():
        return [live(UNARY), live(STREAM)]

    assert becomes([0, 0], both_live)
    before = settled(ended)
    infer(server)
    stream(server)
    stream(server)
    for _ in range(3):
        with pytest.raises(InferenceServerException, match="steps"):
            infer(server, steps=0)
    assert "steps" in stream(server, steps=0)[1]
    answers: queue.SimpleQueue = queue.SimpleQueue()
    client = grpc.InferenceServerClient(server.address)
    slow = inputs({"prompt": "a red circle", **SLOW})
    calls = unet_calls(server)
    call = client.async_infer(UNARY, slow, lambda result, error: answers.put(error))
    wait_for_a_call(server, calls)
    assert becomes([1, 0], both_live)
    call.cancel()
    answers.get(timeout=60)
    assert becomes([0, 0], both_live)
    expected = [then + more for then, more in zip(before, [1, 3, 1, 2, 1, 0], strict=True)]
    assert becomes(expected, ended)


def test_metrics_of_the_engine_and_errors_with_their_request_id(server):
    def counted():
        found = metrics(server)
        return [found.get(f"twinbrush_{name}", 0) for name in (
            "images_total{size=\"native\"}", "refusals_total{reason=\"invalid\"}",
            "unet_call_rows_count{size=\"native\"}", "tick_seconds_bucket{le=\"+Inf\"}",
            "stage_seconds_count{size=\"native\",stage=\"encode_image\"}",
        )]  # fmt: skip

    def wait_until_counted(expected):
        until = time.monotonic() + 30
        while counted() != expected and time.monotonic() < until:
            time.sleep(0.05)
        assert counted() == expected

    before = settled(counted)
    infer(server, steps=2)
    wait_until_counted([then + more for then, more in zip(before, [1, 0, 2, 2, 1], strict=True)])
    assert stream(server, request_id="mine", steps=0)[1].endswith("(request id mine)")
    with pytest.raises(InferenceServerException, match=r"\(request id \w+\)"):
        infer(server, steps=0)
    wait_until_counted([then + more for then, more in zip(before, [1, 2, 2, 2, 1], strict=True)])
    _, error = cancel(server, "mine", prompt="a red circle")
    assert "must be the only input" in error
    wait_until_counted([then + more for then, more in zip(before, [1, 3, 2, 2, 1], strict=True)])
    found = metrics(server)
    budget = found["twinbrush_memory_budget_bytes"]
    assert 0 < found["twinbrush_memory_used_bytes"] <= budget
    assert found["twinbrush_conditioning_cache_limit_bytes"] > 0


def triton_module(monkeypatch, name, **backend):
    """`twinbrush.triton.NAME`, where the server's own module is not there."""
    backend = types.SimpleNamespace(TRITONSERVER_RESPONSE_COMPLETE_FINAL=1, **backend)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    spec = importlib.util.find_spec(f"twinbrush.triton.{name}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("code", "streams", "status", "message"),
    [
        ("UNAVAILABLE", False, 14, "full"),
        ("UNAVAILABLE", True, 14, "UNAVAILABLE: full"),
        ("INVALID_ARG", True, 3, "INVALID_ARGUMENT: full"),
        ("RESOURCE_EXHAUSTED", False, 14, "RESOURCE_EXHAUSTED: full"),
        ("DEADLINE_EXCEEDED", False, 1, "DEADLINE_EXCEEDED: full"),
    ],
)
def test_a_status_that_triton_cannot_send_stands_before_the_message(
    monkeypatch, code, streams, status, message
):
    def error(text, code):
        return text, code

    vars(error).update(UNAVAILABLE=14, INVALID_ARG=3, CANCELLED=1)
    sent = []
    module = triton_module(
        monkeypatch, "answer", TritonError=error, InferenceResponse=lambda error: error
    )
    sender = types.SimpleNamespace(send=lambda response, flags: sent.append(response))
    metrics = types.SimpleNamespace(began=lambda: None, ended=lambda code: None)
    request = types.SimpleNamespace(get_response_sender=lambda: sender, request_id=lambda: "a")
    module.Answer(request, metrics, streams).fail(EngineError(code, "full"))
    assert sent == [(f"{message} (request id a)", status)]


def test_an_answer_that_cannot_be_sent_is_counted_once(monkeypatch):
    """As where shared memory is full."""
    module = triton_module(monkeypatch, "answer")

    def send(response, flags):
        raise RuntimeError("no room")

    codes: list[str] = []
    metrics = types.SimpleNamespace(began=lambda: None, ended=codes.append)
    sender = types.SimpleNamespace(send=send)
    request = types.SimpleNamespace(get_response_sender=lambda: sender, request_id=lambda: "")
    answer = module.Answer(request, metrics)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no room"):
            answer.end()
    assert codes == ["INTERNAL"]


def cancel(server, request_id, **others):
    target = grpc.InferInput("cancel", [1], "BYTES")
    target.set_data_from_numpy(np.array([request_id.encode()], object))
    return stream(server, raw=[target, *inputs(others)])


def test_a_live_request_can_be_cancelled_by_its_id(server):
    answers = []
    before = unet_calls(server)
    start = threading.Thread(target=lambda: answers.append(stream(server, "mine", **SLOW)))
    start.start()
    wait_for_a_call(server, before)
    events, error = cancel(server, "mine")
    assert (events, error) == ([{"event": b"cancelled"}], None)
    start.join(10)
    assert answers[0][1].startswith("CANCELLED: the request was cancelled (request id ")


def test_a_live_request_over_http_can_be_cancelled_by_its_id(server):
    answers = []

    def slow():
        fields = {**SLOW, "id": "over http", "image_format": "png_base64"}
        try:
            answers.append(post(server, f"{STREAM}/generate_stream", **fields))
        except urllib.error.HTTPError as error:  # it was cancelled before its first event
            answers.append(error.read().decode())

    with work_stops(server) as before:
        start = threading.Thread(target=slow)
        start.start()
        wait_for_a_call(server, before)
        said = post(server, f"{STREAM}/generate_stream", prompt=None, cancel="over http")
        assert '"event":"cancelled"' in said
        start.join(10)
    assert "the request was cancelled" in answers[0]


def test_an_id_stops_all_live_requests_that_bear_it(server):
    answers, begun = [], threading.Semaphore(0)

    def slow():
        answers.append(stream(server, "ours", lambda *_: begun.release(), **SLOW))

    threads = [threading.Thread(target=slow) for _ in range(2)]
    for thread in threads:
        thread.start()
        assert begun.acquire(timeout=60)
    _, error = stream(server, "ours", steps=1)  # ends while the others live
    assert error is None
    assert cancel(server, "ours") == ([{"event": b"cancelled"}], None)
    for thread in threads:
        thread.join(10)
    assert [error for _, error in answers] == [
        "CANCELLED: the request was cancelled (request id ours)"
    ] * 2


def test_cancelling_what_does_not_live_says_so(server):
    assert "no live request has the id 'nobody'" in cancel(server, "nobody")[1]


def test_a_full_queue_refuses_and_recovers(repository, start_server, tmp_path):
    copy = shutil.copytree(repository, tmp_path / "copy")
    config = copy / STREAM / "config.pbtxt"
    text = config.read_text()
    assert 'key: "queue_size" value: { string_value: "512" }' in text
    config.write_text(text.replace('"queue_size" value: { string_value: "512"',
                                   '"queue_size" value: { string_value: "2"'))  # fmt: skip
    server = start_server(copy)
    server.wait_for("ready in")
    client = grpc.InferenceServerClient(server.address)
    answers: queue.SimpleQueue = queue.SimpleQueue()
    slow = inputs({"prompt": "a red circle", **SLOW})
    calls = [
        client.async_infer(UNARY, slow, lambda result, error: answers.put(error)) for _ in range(5)
    ]
    refused = [answers.get(timeout=60) for _ in range(3)]
    assert {error.status() for error in refused} == {"StatusCode.UNAVAILABLE"}
    assert "RESOURCE_EXHAUSTED: the queue is full (2 requests): retry after" in refused[0].message()
    for call in calls:
        call.cancel()
    left = [answers.get(timeout=60) for _ in range(2)]
    assert all("CANCELLED" in error.status() for error in left)
    until = time.monotonic() + 30
    while not recovered(server):
        assert time.monotonic() < until
    assert server.stop() == 0


def recovered(server) -> bool:
    try:
        return len(infer(server).as_numpy("image")) == 1
    except InferenceServerException as error:
        if error.status() != "StatusCode.UNAVAILABLE":
            raise
        return False


def outcome(server, kind: str, streamed: bool, fields: dict) -> str:
    """How one request of the crowd ended: image, error or cancel, or what broke."""
    if kind == "cancel":
        return outcome_of_a_cancel(server, fields | {"num_images": 16})
    if kind == "error":
        fields = fields | {"steps": 0}
    images, error = 0, None
    if streamed:
        events, error = stream(server, **fields)
        images = sum(event["event"] == b"image" for event in events)
    else:
        try:
            images = len(infer(server, **fields).as_numpy("image"))
        except InferenceServerException as caught:
            error = caught.message()
    if error:
        return "error" if images == 0 and "steps=0" in error else f"broken: {error}"
    return "image" if images == fields["num_images"] else f"broken: {images} images"


def outcome_of_a_cancel(server, fields: dict) -> str:
    answers: queue.SimpleQueue = queue.SimpleQueue()
    client = grpc.InferenceServerClient(server.address)
    slow = inputs({"prompt": "a red circle", "num_images": 4, **fields, "steps": 50})
    call = client.async_infer(UNARY, slow, lambda result, error: answers.put(error))
    time.sleep(fields["seed"] % 20 / 100)
    call.cancel()
    error = answers.get(timeout=60)
    return "cancel" if error and "CANCELLED" in error.status() else f"broken: {error}"


def test_two_hundred_mixed_requests_end_each_in_one_way(server):
    """Images, errors and cancels from 16 clients; none is lost, none harms another."""
    rng = random.Random(3)
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    for number in range(200):
        fields = {
            "seed": number, "steps": rng.randint(1, 20), "width": rng.choice([32, 32, 32, 48]),
            "sampler": rng.choice(["lcm", "ddim", "euler", "dpmpp_2m"]),
            "guidance_scale": rng.choice([1.0, 3.0]), "num_images": rng.choice([1, 1, 2]),
        }  # fmt: skip
        jobs.put((rng.choice(["image", "image", "error", "cancel"]), rng.random() < 0.5, fields))
    outcomes: list[tuple[str, str]] = []

    def work():
        with contextlib.suppress(queue.Empty):
            while True:
                job = jobs.get_nowait()
                outcomes.append((job[0], outcome(server, *job)))

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    assert len(outcomes) == 200
    assert [pair for pair in outcomes if pair[0] != pair[1]] == []


@pytest.mark.parametrize(
    "path", ["systemsharedmemory/region/x/register", "repository/index", "logging", "trace/setting"]
)
def test_clients_neither_map_memory_nor_change_the_server(server, path):
    body = json.dumps({"key": "/x", "offset": 0, "byte_size": 64}).encode()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{server.url}/v2/{path}", body), timeout=30)
    assert refused.value.code == 403
    with (
        grpc.InferenceServerClient(server.address) as client,
        pytest.raises(InferenceServerException),
    ):
        client.register_system_shared_memory("x", "/x", 64)


def test_an_array_that_never_changes_becomes_a_tensor_once(monkeypatch):
    made = []
    response = types.SimpleNamespace(has_error=lambda: False, output_tensors=list)
    module = triton_module(
        monkeypatch, "models", TRITONSERVER_MEMORY_CPU=0,
        InferenceRequest=lambda **given: types.SimpleNamespace(exec=lambda: response),
        PreferredMemory=lambda kind, device: None, Tensor=lambda name, array: made.append(name),
    )  # fmt: skip
    models = module.TritonModels(fail=lambda reason: None)
    first, second, moving = np.zeros((3, 2, 3))
    for text in (first, second):
        text.setflags(write=False)
    for text in (first, first, second, second, first):
        models.run("unet", {"text": text, "sample": moving})
    assert made == ["text", "sample", "sample", "text", "sample", "sample", "text", "sample"]
