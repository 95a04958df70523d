"""The gateway's OpenAI door, by OpenAI's own package, and what all doors share."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import io
import json
import re
import signal
import socket
import threading
import time
import urllib.request

import openai
import pytest
from fastapi.testclient import TestClient
from openai._streaming import SSEDecoder
from PIL import Image
from test_wire import unet_calls, wait_for_a_call, work_stops

from gateway.app import Settings, create_app
from gateway.gate import Gate
from gateway.keys import digest
from gateway.pool import Pool
from twinbrush_client import Client

GENERATIONS = "/v1/images/generations"
SLOW_BODY = {"prompt": "a red circle", "n": 16, "steps": 50, "size": "128x128"}


@pytest.fixture(scope="module")
def client(gateway):
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_openais_package_gets_the_pictures_that_grpc_gets(client, server):
    answer = client.images.generate(
        prompt="a red circle", n=2, size="32x64", extra_body={"seed": 5, "steps": 3}
    )
    with Client(server.address) as direct:
        wanted = direct.generate("a red circle", seed=5, steps=3, num_images=2, width=32, height=64)
    assert [picture(d.b64_json).tobytes() for d in answer.data] == [w.tobytes() for w in wanted]
    assert [d.seed for d in answer.data] == [5, 6]
    assert (answer.size, answer.output_format, answer.background) == ("32x64", "png", "opaque")
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.usage.input_tokens == 3


def test_a_picture_streams_with_partial_images(client):
    own = {"seed": 5, "steps": 8}
    events = list(
        client.images.generate(
            prompt="a red circle", stream=True, partial_images=3, n=2, size="64x32", extra_body=own
        )
    )
    partial = [e for e in events if e.type == "image_generation.partial_image"]
    completed = [e for e in events if e.type == "image_generation.completed"]
    assert len(events) == len(partial) + len(completed)
    places = sorted((e.image_index, e.partial_image_index) for e in partial)
    assert places == [(i, k) for i in range(2) for k in range(3)]
    assert sorted(e.image_index for e in completed) == [0, 1]
    assert {picture(e.b64_json).size for e in events} == {(64, 32)}
    assert completed[0].usage.output_tokens > 0
    whole = client.images.generate(prompt="a red circle", n=2, size="64x32", extra_body=own)
    assert {e.b64_json for e in completed} == {d.b64_json for d in whole.data}


def test_a_stream_that_lasts_sends_comments_that_clients_skip(server, monkeypatch):
    monkeypatch.setattr("gateway.openai.QUIET_SECONDS", 0.0)
    with TestClient(create_app(Pool([server.address], 60), Settings(page=False), Gate())) as web:
        body = {"prompt": "a ring", "steps": 3, "stream": True}
        text = web.post(GENERATIONS, json=body).text
    events = [line for line in text.split("\n\n") if line]
    assert events[0] == ": painting"
    sent = list(SSEDecoder().iter_bytes(iter([text.encode()])))
    assert [event.event for event in sent] == ["image_generation.completed"]


def test_no_partial_images_is_one_event_a_picture(client):
    (event,) = client.images.generate(prompt="a red circle", stream=True, partial_images=0)
    assert event.type == "image_generation.completed"


@pytest.mark.parametrize(("name", "fewer"), [("jpeg", 20), ("webp", 20)])
def test_formats_and_their_compression(client, name, fewer):
    own = {"seed": 5}
    files = [
        base64.b64decode(
            client.images.generate(
                prompt="a red circle", output_format=name, output_compression=quality,
                extra_body=own,
            ).data[0].b64_json
        )
        for quality in (fewer, 100)
    ]  # fmt: skip
    assert {Image.open(io.BytesIO(data)).format for data in files} == {name.upper()}
    assert len(files[0]) < len(files[1])


def test_quality_is_steps(client):
    def steps(**more):
        (image,) = client.images.generate(prompt="a red circle", **more).data
        return json.loads(picture(image.b64_json).info["twinbrush"])["steps"]

    own = steps()
    assert steps(quality="high") == steps(quality="hd") == 2 * own
    assert steps(quality="low") == max(1, round(own / 2))
    assert steps(quality="high", extra_body={"steps": 3}) == 3


def test_a_url_serves_the_picture_and_is_signed(client, gateway):
    answer = client.images.generate(
        prompt="a red circle", response_format="url", output_format="webp", extra_body={"seed": 5}
    )
    url = answer.data[0].url
    with urllib.request.urlopen(url) as file:
        assert Image.open(io.BytesIO(file.read())).format == "WEBP"
        assert file.headers["content-type"] == "image/webp"
    path = url.removeprefix(gateway.url)
    head = gateway.call(path, method="HEAD")
    assert (head.status, head.headers["content-type"], head.data) == (200, "image/webp", b"")
    assert gateway.call(path[:-1] + ("0" if path[-1] != "0" else "1")).status == 404
    assert gateway.call(path.replace("expires=1", "expires=2")).status == 404


def test_models_are_the_checkpoints(client):
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    assert client.images.generate(prompt="a red circle", model=model.id).data
    missing = "'dall-e-3' does not exist; served are "
    with pytest.raises(openai.NotFoundError, match=missing) as error:
        client.images.generate(prompt="a red circle", model="dall-e-3")
    assert (error.value.param, error.value.code) == ("model", "model_not_found")


REFUSED = [
    ({"promt": "x"}, "promt", "unknown_parameter"),
    ({"prompt": None}, "prompt", "invalid_type"),
    ({"prompt": ""}, "prompt", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": "2"}, "n", "invalid_type"),
    ({"seed": 2**63}, "seed", "invalid_value"),
    ({"size": "33x32"}, "size", "invalid_value"),
    ({"size": "big"}, "size", "invalid_value"),
    ({"sampler": "magic"}, "sampler", "invalid_value"),
    ({"output_format": "gif"}, "output_format", "unsupported_value"),
    ({"background": "transparent"}, "background", "unsupported_value"),
    ({"svg": {"model": "x"}}, "svg", "unsupported_value"),
    ({"output_compression": 50}, "output_compression", "invalid_value"),
    ({"partial_images": 2}, "partial_images", "invalid_value"),
    ({"stream": True, "response_format": "url"}, "response_format", "invalid_value"),
    ({"stream": True, "sampler": "magic"}, "sampler", "invalid_value"),
]


@pytest.mark.parametrize(("fields", "param", "code"), REFUSED, ids=[str(r[0]) for r in REFUSED])
def test_what_is_not_allowed_is_refused_by_name(gateway, fields, param, code):
    answer = gateway.call(GENERATIONS, {"prompt": "a red circle"} | fields)
    error = answer.json()["error"]
    assert (answer.status, error["param"], error["code"]) == (400, param, code)
    assert error["type"] == "invalid_request_error"
    assert param in error["message"]


def test_a_size_of_another_form_is_told_the_form(gateway):
    answer = gateway.call(GENERATIONS, {"prompt": "a red circle", "size": "32X32"})
    assert "must be WIDTHxHEIGHT in pixels" in answer.json()["error"]["message"]


def test_fields_without_an_effect_are_taken(client):
    answer = client.images.generate(
        prompt="a red circle", moderation="low", style="vivid", background="opaque", user="me",
        size="auto", response_format="b64_json",
        extra_body={"complexity": "high", "svg": None, "frame_count": None},
    )  # fmt: skip
    assert answer.safety_identifier == "me"


def test_image_inputs_are_refused(client):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "png")
    file = ("a.png", buffer.getvalue())
    with pytest.raises(openai.BadRequestError, match="Image inputs are not served"):
        client.images.edit(image=file, prompt="a red circle")
    with pytest.raises(openai.BadRequestError, match="Image inputs are not served"):
        client.post("/images/variations", cast_to=object, files={"image": file}, body={"n": 1})


def test_every_answer_has_its_request_id(gateway):
    assert gateway.call("/v1/none", x_request_id="my-id").headers["x-request-id"] == "my-id"
    ids = {gateway.call("/v1/none", x_request_id=i).headers["x-request-id"] for i in ("a b", "")}
    assert len(ids) == 2
    assert all(i.startswith("req-") for i in ids)


def test_errors_of_routes_and_bodies_have_openais_form(gateway):
    wrong = [
        ("/v1/none", "GET", 404, "is not served"),
        ("/images/generations", "POST", 404, "OpenAI's API is under /v1"),
        ("/v1/models", "PUT", 405, "PUT /v1/models is not allowed: use GET."),
    ]
    for path, method, status, text in wrong:
        answer = gateway.call(path, method=method)
        assert (answer.status, set(answer.json()["error"])) == (
            status, {"message", "type", "param", "code"},
        )  # fmt: skip
        assert text in answer.json()["error"]["message"]
    answer = gateway.call(GENERATIONS, {"prompt": "x"}, content_type="text/plain")
    assert "content-type: application/json" in answer.json()["error"]["message"]
    answer = gateway.call(GENERATIONS, {"prompt": "x"}, content_encoding="gzip")
    assert (answer.status, answer.json()["error"]["code"]) == (415, "unsupported_encoding")
    answer = gateway.call(GENERATIONS, b'{"prompt": ' + b"[" * 50_000)
    assert (answer.status, answer.json()["error"]["code"]) == (400, "invalid_body")
    answer = gateway.call(GENERATIONS, b'{"seed": ' + b"9" * 5000 + b"}")
    assert "without numbers of thousands of digits" in answer.json()["error"]["message"]
    answer = gateway.call(GENERATIONS, b'{"prompt": "\xff"}')
    assert (answer.status, answer.json()["error"]["code"]) == (400, "invalid_body")
    assert "must be JSON in UTF-8" in answer.json()["error"]["message"]
    answer = gateway.call(GENERATIONS, {"prompt": "x", "\ud800": 1})
    assert (answer.status, answer.json()["error"]["code"]) == (400, "invalid_value")


def test_headers_and_addresses_are_bounded(gateway):
    for start in ("GET /health/live HTTP/1.1\r\nx: ", "GET /"):
        with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as connection:
            with contextlib.suppress(ConnectionError):  # closed before it has read everything
                connection.sendall(start.encode() + b"a" * 2**20)
            assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_a_connection_outlives_what_is_refused(gateway):
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=20)
    json_type = {"content-type": "application/json"}
    refusals = [
        ("POST", GENERATIONS, b"{}", json_type, 400),
        ("POST", GENERATIONS, b"{}", json_type | {"content-encoding": "gzip"}, 415),
        ("GET", "/v1/none", None, {}, 404),
        ("OPTIONS", GENERATIONS, None, {"origin": "https://a.example"}, 405),
    ]
    for method, path, body, headers, status in refusals:
        connection.request(method, path, body, headers)
        socket_of_it = connection.sock
        answer = connection.getresponse()
        assert (answer.status, bool(json.loads(answer.read())["error"])) == (status, True)
        assert connection.sock is socket_of_it is not None
    connection.close()


@pytest.mark.parametrize(
    "path",
    ["/health/live", "/health/ready", "/v1/models", "/sdapi/v1/options", "/metrics", "/docs"],
)
def test_whatever_is_read_may_be_asked_without_a_body(gateway, path):
    answer = gateway.call(path, method="HEAD")
    assert (answer.status, answer.data) == (200, b"")
    assert answer.headers["content-type"] == gateway.call(path).headers["content-type"]


def test_a_slash_at_the_end_of_a_path_is_no_matter(gateway):
    class Strict(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_):
            return None

    opener = urllib.request.build_opener(Strict)
    for path in ("/v1/models", "/sdapi/v1/options", "/metrics"):
        with opener.open(f"{gateway.url}{path}/") as answer:
            assert answer.read()[:20] == gateway.call(path).data[:20]
    assert gateway.call(f"{GENERATIONS}/", {"prompt": "a ring"}).status == 200


def test_what_is_not_read_has_no_head(gateway):
    answer = gateway.call(GENERATIONS, method="HEAD")
    assert (answer.status, answer.headers["allow"], answer.data) == (405, "POST", b"")


@pytest.mark.parametrize("encoding", ["identity", "Identity", ""])
def test_a_body_as_it_is_has_the_encoding_identity(gateway, encoding):
    assert gateway.call(GENERATIONS, {"prompt": "x"}, content_encoding=encoding).status == 200


def post_and_leave(gateway, body, wait):
    """Sends a request, waits, and closes the connection."""
    data = json.dumps(body).encode()
    head = (
        f"POST {GENERATIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        connection.sendall(head.encode() + data)
        wait(connection)


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_the_server(gateway, server, stream):
    with work_stops(server) as before:
        body = SLOW_BODY | {"stream": stream}
        post_and_leave(gateway, body, lambda _: wait_for_a_call(server, before))
    live = "twinbrush_gateway_requests_live"
    until(lambda: gateway.metrics()[live] == 1)  # the one that asks
    outstanding = f'twinbrush_gateway_server_outstanding_work{{server="{server.address}"}}'
    assert gateway.metrics()[outstanding] == 0


def test_a_drain_finishes_what_lives_and_refuses_what_is_new(server, start_gateway):
    gateway = start_gateway(server.address)
    assert gateway.call("/health/ready").status == 200
    answers = []
    before = unet_calls(server)
    body = SLOW_BODY | {"n": 1}
    live = threading.Thread(target=lambda: answers.append(gateway.call(GENERATIONS, body)))
    live.start()
    wait_for_a_call(server, before)
    gateway.process.send_signal(signal.SIGTERM)
    until(lambda: gateway.call("/health/ready").status == 503)
    refused = gateway.call(GENERATIONS, {"prompt": "a red circle"})
    assert (refused.status, refused.json()["error"]["code"]) == (503, "draining")
    assert refused.headers["retry-after"]
    live.join(60)
    assert answers[0].status == 200
    assert gateway.process.wait(20) == 0


def test_a_drain_that_is_late_ends_what_lives(server, start_gateway):
    gateway = start_gateway(server.address, flags=("--drain-seconds", "0"))
    answers = []
    with work_stops(server) as before:
        live = threading.Thread(target=lambda: answers.append(gateway.call(GENERATIONS, SLOW_BODY)))
        live.start()
        wait_for_a_call(server, before)
        assert gateway.stop() == 0
        live.join(60)
    assert (answers[0].status, answers[0].json()["error"]["code"]) == (503, "server_unavailable")
    assert "Traceback" not in gateway.text()


KEY, BOB = "a-key-that-nobody-guesses", "another-key-of-that-kind"


@pytest.fixture(scope="module")
def locked(server, start_gateway, tmp_path_factory):
    """A gateway with a key in a file, a key in the environment, limits, and CORS."""
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(
        f'[ann]\nsha256 = "{digest(KEY)}"\nconcurrent = 1\n'
        f'[bob]\nsha256 = "{digest(BOB)}"\nconcurrent = 1\nrequests_per_minute = 600\n'
    )
    flags = ("--keys-file", str(file), "--cors-origin", "https://a.example", "--max-body-mb",
             "0.01", "--requests-per-minute", "2", "--work", "100")  # fmt: skip
    return start_gateway(server.address, flags=flags, env={"TWINBRUSH_API_KEYS": "k" * 16})


def test_keys_open_the_doors(locked):
    assert "Traceback" not in locked.text()
    assert "serves /v1, /sdapi/v1 and /docs" in locked.text()
    for path in ("/v1/models", "/metrics"):
        assert locked.call(path).status == 401
        assert locked.call(path, authorization=f"Bearer {KEY}x").status == 401
        assert locked.call(path, authorization=f"Bearer {KEY}").status == 200
        assert locked.call(path, authorization="Bearer " + "k" * 16).status == 200
    basic = base64.b64encode(f"user:{KEY}".encode()).decode()
    assert locked.call("/v1/models", authorization=f"Basic {basic}").status == 200
    assert locked.call("/health/live").status == 200
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
        client.models.list()


def test_a_key_has_its_own_limits(locked, server):
    other = {"authorization": "Bearer " + "k" * 16}
    big = locked.call(GENERATIONS, SLOW_BODY, **other)
    assert (big.status, big.json()["error"]["code"]) == (400, "too_much_work")
    answers = [locked.call(GENERATIONS, {"prompt": "a red circle"}, **other) for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
    assert 0 < int(answers[2].headers["retry-after"]) <= 30
    left = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
    assert left == ["1", "0", "0"]
    assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {"2"}
    assert re.fullmatch(r"\d+(\.\d+)?s", answers[0].headers["x-ratelimit-reset-requests"])
    assert locked.call("/v1/models", **other).headers["x-ratelimit-limit-requests"] is None
    ann = {"authorization": f"Bearer {KEY}"}
    assert locked.call(GENERATIONS, {"prompt": "a red circle"}, **ann).status == 200


def test_openais_package_waits_where_a_limit_is_reached(locked):
    async def paint():
        async with openai.AsyncOpenAI(
            base_url=f"{locked.url}/v1", api_key=BOB, max_retries=20
        ) as client:
            both = [
                client.images.with_raw_response.generate(
                    prompt="a red circle", n=2, size="64x64", extra_body={"steps": 12}
                )
                for _ in range(2)
            ]
            stream = await client.images.generate(prompt="a ring", stream=True, partial_images=1)
            first = await anext(aiter(stream))
            answers = await asyncio.gather(*both)
            await stream.close()
            return first, answers

    first, answers = asyncio.run(paint())
    assert first.type == "image_generation.partial_image"
    assert sorted(answer.retries_taken for answer in answers)[1] > 0
    assert [len(answer.parse().data) for answer in answers] == [2, 2]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "600"


@pytest.mark.parametrize("header", [f"Token {KEY}", KEY])
def test_a_key_of_another_scheme_is_told_which_one_is_read(locked, header):
    answer = locked.call("/v1/models", authorization=header)
    assert (answer.status, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert "Send it as `Authorization: Bearer KEY`" in answer.json()["error"]["message"]


def test_bodies_are_bounded_and_other_origins_are_let_in_by_name(locked, gateway):
    ann = {"authorization": f"Bearer {KEY}"}
    large = locked.call(GENERATIONS, {"prompt": "x" * 20_000}, **ann)
    assert (large.status, large.json()["error"]["code"]) == (413, "body_too_large")
    asked = {"origin": "https://a.example"}
    allowed = "access-control-allow-origin"
    assert locked.call("/health/live", **asked).headers[allowed] == "https://a.example"
    assert locked.call("/health/live", origin="https://b.example").headers[allowed] is None
    assert gateway.call("/health/live", **asked).headers[allowed] is None
    shown = locked.call("/health/live", **asked).headers["access-control-expose-headers"]
    assert {"x-request-id", "retry-after", "retry-after-ms"} <= set(shown.split(", "))


def test_a_body_of_unknown_length_is_bounded_too(locked):
    connection = http.client.HTTPConnection("127.0.0.1", locked.port, timeout=20)
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    with contextlib.suppress(ConnectionError):
        connection.request(
            "POST", GENERATIONS, iter([b"x" * 1000] * 50), headers, encode_chunked=True
        )
    assert connection.getresponse().status == 413
    connection.close()


def test_the_front_page_leads_on(gateway):
    assert b"The page is switched off." in gateway.call("/").data
    assert GENERATIONS in gateway.call("/openapi.json").json()["paths"]
