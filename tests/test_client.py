"""The client package, against the real server."""

from __future__ import annotations

import asyncio
import copy
import inspect
import multiprocessing
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import numpy as np
import pytest
from harness import free_ports
from test_wire import SLOW, unet_calls, work_stops
from tritonclient.grpc import service_pb2_grpc
from typer.testing import CliRunner

from twinbrush_client import (
    AsyncClient,
    Cancelled,
    Client,
    DeadlineExceeded,
    InvalidRequest,
    Picture,
    Preview,
    Progress,
    QueueFull,
    ServerUnavailable,
    TwinbrushError,
)
from twinbrush_client.cli import app
from twinbrush_client.connection import Connection
from twinbrush_client.errors import NothingListens, error_of
from twinbrush_client.fields import DATA_TYPES, STREAM_ONLY


@pytest.fixture
def client(server):
    with Client(server.address) as client:
        yield client


def test_generate_gives_pictures_that_know_their_seed(client):
    images = client.generate("a red circle", num_images=2, seed=7, steps=3)
    assert [image.info["seed"] for image in images] == [7, 8]
    assert [image.size for image in images] == [(32, 32)] * 2


def test_stream_yields_progress_previews_and_pictures(client):
    events = list(client.stream("a red circle", steps=3, preview_every=2, seed=1))
    assert [type(event) for event in events] == [Progress, Preview, Progress, Picture]
    assert events[1].image.size == (8, 8)
    assert (
        events[-1].image.tobytes() == client.generate("a red circle", steps=3, seed=1)[0].tobytes()
    )


@pytest.mark.parametrize("way", ["break", "cancel", "other thread"])
def test_a_stream_that_is_left_stops_the_work(client, server, way):
    with work_stops(server), client.stream("a red circle", **SLOW) as stream:
        events = iter(stream)
        next(events)
        if way == "cancel":
            stream.cancel()
        elif way == "other thread":
            threading.Thread(target=stream.cancel).start()
            with pytest.raises(Cancelled, match="the request was cancelled"):
                list(events)


def test_pictures_have_their_seeds_and_files(client):
    pictures = client.pictures("a red circle", num_images=2, seed=7, steps=3, deterministic=True)
    *_, last = client.stream("a red circle", seed=8, steps=3, deterministic=True)
    assert [(p.index, p.seed) for p in pictures] == [(0, 7), (1, 8)]
    assert pictures[1].data == last.data
    with pytest.raises(InvalidRequest, match="progress=True is invalid: is a field of stream"):
        client.pictures("a red circle", progress=True)


def test_what_the_server_refuses_is_an_error_with_its_code(client):
    with pytest.raises(TwinbrushError, match="steps=0 is invalid") as error:
        client.generate("a red circle", steps=0)
    assert error.value.code == "INVALID_ARGUMENT"
    with pytest.raises(InvalidRequest, match=r"^steps=0 is invalid") as error:
        list(client.stream("a red circle", steps=0))
    assert error.value.code == "INVALID_ARGUMENT"


WRONG_TYPES = [
    ({"seed": 2**63}, "seed=9223372036854775808 is invalid: must be 0 to"),
    ({"seed": 10**5000}, "seed=<an integer of 16610 bits> is invalid"),
    ({"steps": "x"}, "steps='x' is invalid: must be an integer."),
    ({"steps": 4.9}, "steps=4.9 is invalid: must be an integer."),
    ({"steps": True}, "steps=True is invalid: must be an integer."),
    ({"guidance_scale": "y"}, "guidance_scale='y' is invalid: must be a number."),
    ({"guidance_scale": 1e300}, "guidance_scale=1e+300 is invalid: must be 0 to 50."),
    ({"deterministic": "false"}, "deterministic='false' is invalid: must be True or False."),
    ({"deterministic": 0}, "deterministic=0 is invalid: must be True or False."),
    ({"sampler": 3}, "sampler=3 is invalid: must be text."),
    ({"prompt": 3}, "prompt=3 is invalid: must be text."),
    ({"prompt": ["a", 3]}, "prompt=3 is invalid: must be text."),
    ({"prompt": b"a"}, "prompt=b'a' is invalid: must be text."),
    ({"prompt": "\ud800"}, "prompt='\\ud800' is invalid: must be text that UTF-8 can hold."),
    ({"prompt": "x" * 10**7}, "prompt='xxx"),
    ({"steps": 3, "num_inference_steps": 3}, "num_inference_steps=3 is invalid: is another name"),
    ({"preview_every": 2}, "preview_every=2 is invalid: is a field of stream() only."),
]


@pytest.mark.parametrize(("fields", "message"), WRONG_TYPES, ids=[m[:30] for _, m in WRONG_TYPES])
def test_types_are_checked_and_not_coerced(fields, message):
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequest) as error:
        client.generate(**{"prompt": "a red circle"} | fields)
    assert str(error.value).startswith(message)
    assert len(str(error.value)) < 200
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("way", ["stream", "pictures"])
@pytest.mark.parametrize("wrong", [5, b"id", "\ud800", "a" * 257])
def test_a_request_id_is_text(client, way, wrong):
    with pytest.raises(InvalidRequest, match=r"request_id=.*must be text of up to 256"):
        getattr(client, way)("a ring", request_id=wrong)


def sent(error):
    """As it comes out of a pipe between processes."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with receiver, sender:
        sender.send(error)
        return receiver.recv()


@pytest.mark.parametrize("way", [copy.copy, sent])
@pytest.mark.parametrize("kind", [TwinbrushError, InvalidRequest, QueueFull, NothingListens])
def test_errors_reach_other_processes(kind, way):
    error = kind("UNAVAILABLE", "no place (request id a-1)", 2.0)
    error.add_note("of the third prompt")
    made = way(error)
    assert type(made) is kind
    assert (str(made), made.code, made.retry_after) == (str(error), "UNAVAILABLE", 2.0)
    assert (made.request_id, made.__notes__) == ("a-1", ["of the third prompt"])


def test_times_may_be_of_numpy_and_longer_than_grpc_counts(server):
    for timeout in (np.int64(60), np.float32(60), 1e12, 10**400):
        with Client(server.address, timeout, max_retries=np.int64(0)) as client:
            assert client.ready()
            assert client.generate("a ring", steps=1, timeout=timeout)


def test_numbers_of_numpy_are_numbers(client):
    fields = {"seed": np.int64(3), "steps": np.int32(2), "guidance_scale": np.float32(2)}
    (image,) = client.generate("a red circle", deterministic=np.bool_(True), **fields)
    assert image.info["seed"] == 3


def test_diffusers_names_are_accepted(client):
    pictures = client.generate("a ring", num_inference_steps=2, num_images_per_prompt=2, seed=1)
    assert len(pictures) == 2
    assert pictures[0].tobytes() == client.generate("a ring", steps=2, seed=1)[0].tobytes()


@pytest.mark.parametrize("names", [("steps", "num_inference_steps")[::way] for way in (1, -1)])
def test_a_field_that_is_given_by_both_its_names_is_refused(client, names):
    message = "num_inference_steps=4 is invalid: is another name of steps"
    with pytest.raises(InvalidRequest, match=message):
        client.generate("a ring", **dict.fromkeys(names, 4))


def test_a_client_that_is_closed_says_so(server):
    async def use(aio):
        await aio.close()
        await aio.generate("a ring")

    client = Client(server.address)
    client.close()
    for ask in (
        client.info, client.ready, lambda: client.generate("a ring"),
        lambda: client.stream("a ring"), lambda: with_async_client(server, use),
    ):  # fmt: skip
        with pytest.raises(TwinbrushError, match="the client is closed"):
            ask()


def test_a_list_of_prompts_gives_their_pictures_in_order(client):
    prompts = [f"{number} rings" for number in range(20)]  # more than are sent at once
    pictures = client.generate(prompts, seed=5, steps=2, deterministic=True)
    assert [picture.info["seed"] for picture in pictures] == [*range(5, 25)]
    (alone,) = client.generate(prompts[7], seed=12, steps=2, deterministic=True)
    assert pictures[7].tobytes() == alone.tobytes()


def test_a_bad_prompt_of_a_list_stops_the_others(client, server):
    with work_stops(server), pytest.raises(InvalidRequest, match="prompt='' is invalid"):
        client.generate(["", *["a red circle"] * 3], **SLOW)


def test_signatures_name_every_field():
    for method in (Client.generate, AsyncClient.generate):
        names = set(inspect.signature(method).parameters)
        assert names >= {"prompt", "timeout", "num_inference_steps", *DATA_TYPES} - {*STREAM_ONLY}
        assert not names & {*STREAM_ONLY, "fields"}
    assert {*STREAM_ONLY, "steps"} <= set(inspect.signature(Client.stream).parameters)


def test_info_tells_what_is_served(client):
    info = client.info()
    sizes = {"native": 32, "multiple_of": 8, "largest": 128, "max_pixels": None}
    assert info.sizes == sizes
    assert "ddim" in info.samplers
    assert info.defaults["num_images"] == 1
    assert {field["name"] for field in info.fields} == {*DATA_TYPES}


def test_a_field_that_is_none_is_named(client):
    with pytest.raises(TwinbrushError, match=r"step=4 is invalid: is no field; .*prompt, .*steps"):
        client.generate("a red circle", step=4)


@pytest.mark.parametrize("wanted", ["raw", "png_base64"])
def test_a_format_that_is_no_picture_is_refused_before_it_is_painted(client, server, wanted):
    before = unet_calls(server)
    for ask in (client.generate, client.stream):
        with pytest.raises(
            TwinbrushError, match=f"image_format='{wanted}' .*one of png, jpeg, webp"
        ):
            ask("a red circle", image_format=wanted)
    assert unet_calls(server) == before


@pytest.mark.parametrize("name", ["jpeg", "webp", "avif"])
def test_other_formats_are_pictures(client, name):
    (image,) = client.generate("a red circle", steps=1, image_format=name)
    assert (image.format, image.size) == (name.upper(), (32, 32))


def test_a_server_that_is_not_there_is_an_error():
    with Client("127.0.0.1:1", max_retries=1) as client:
        assert not client.ready()
        with pytest.raises(
            ServerUnavailable, match=r"no server answers at 127\.0\.0\.1:1"
        ) as error:
            client.generate("a red circle")
        with pytest.raises(ServerUnavailable, match="no server answers"):
            list(client.stream("a red circle"))
    assert error.value.code == "UNAVAILABLE"


@pytest.mark.parametrize("address", ["", "localhost", "http://localhost:8001", "a b:1"])
def test_an_address_without_a_port_or_with_a_scheme_is_refused(address):
    with pytest.raises(InvalidRequest, match="must be host:port of the server's gRPC endpoint"):
        Client(address)


def test_a_server_that_does_not_speak_grpc_is_named():
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{http.server_port}"
        with Client(address, max_retries=0) as client:
            with pytest.raises(ServerUnavailable, match=f"{address} does not speak gRPC; the gRPC"):
                client.info()
            assert not client.ready()
        http.shutdown()


def test_a_proxy_in_the_environment_is_not_used_on_loopback(client, monkeypatch, server):
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with Client(server.address) as through, Client("192.0.2.1:8001", timeout=20) as other:
        assert through.ready()
        with pytest.raises(ServerUnavailable, match="through the proxy of grpc_proxy"):
            other.generate("a red circle")


@pytest.mark.parametrize("way", ["generate", "stream"])
def test_a_timeout_of_a_call_ends_it(client, server, way):
    with work_stops(server), pytest.raises(DeadlineExceeded, match="within its timeout"):
        list(getattr(client, way)("a red circle", timeout=0.3, **SLOW))


class Flaky:
    """A gRPC server that refuses calls before it passes them on to the real one."""

    def __init__(self, address: str, refusals: int, code: grpc.StatusCode, message: str):
        self.calls, self.refusals, self.refusal = 0, refusals, (code, message)
        self.metadata: list[dict] = []
        real = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(address))
        servicer = service_pb2_grpc.GRPCInferenceServiceServicer()
        servicer.ModelInfer = lambda request, context: real.ModelInfer(
            self.passed(request, context)
        )
        servicer.ModelStreamInfer = lambda requests, context: real.ModelStreamInfer(
            iter([self.passed(next(requests), context)])
        )
        self.server = grpc.server(ThreadPoolExecutor(4))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"

    def passed(self, request, context):
        self.calls += 1
        self.metadata.append(dict(context.invocation_metadata()))
        if self.calls <= self.refusals:
            context.abort(*self.refusal)
        return request

    def __enter__(self):
        self.server.start()
        return self

    def __exit__(self, *exc):
        self.server.stop(None)


FULL = "the queue is full (2 requests): try again in 50 ms"


@pytest.mark.parametrize("way", ["generate", "stream"])
@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_a_full_server_is_tried_again(server, way, code):
    with Flaky(server.address, 2, code, FULL) as flaky, Client(flaky.address) as client:
        assert len(list(getattr(client, way)("a red circle", steps=1))) >= 1
        assert flaky.calls == 3
    with Flaky(server.address, 2, code, FULL) as flaky:
        with Client(flaky.address, max_retries=1) as client, pytest.raises(QueueFull) as error:
            list(getattr(client, way)("a red circle", steps=1))
        assert (flaky.calls, error.value.retry_after) == (2, 0.05)


def test_what_another_try_cannot_mend_is_not_tried_again(server):
    code = grpc.StatusCode.INTERNAL
    with Flaky(server.address, 1, code, "broken") as flaky, Client(flaky.address) as client:
        with pytest.raises(TwinbrushError, match="broken"):
            client.generate("a red circle")
        assert flaky.calls == 1


def test_headers_reach_the_server(server):
    with Flaky(server.address, 0, grpc.StatusCode.INTERNAL, "") as flaky:
        with Client(flaky.address, headers={"X-Api-Key": "secret"}) as client:
            client.generate("a red circle", steps=1)
            list(client.stream("a red circle", steps=1))
        assert [sent["x-api-key"] for sent in flaky.metadata] == ["secret"] * 2


@pytest.fixture(scope="module")
def pem(tmp_path_factory):
    """A certificate of localhost and its key, and a key of another."""
    folder = tmp_path_factory.mktemp("pem")
    for name in ("certificate", "other"):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
             "-nodes", "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem", "-days",
             "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
            check=True, capture_output=True,
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def secure(server, pem):
    """A server that asks clients for a certificate, and its port."""
    pair = [((pem / "certificate.key").read_bytes(), (pem / "certificate.pem").read_bytes())]
    asking = grpc.ssl_server_credentials(pair, pair[0][1], require_client_auth=True)
    flaky = Flaky(server.address, 0, grpc.StatusCode.INTERNAL, "")
    port = flaky.server.add_secure_port("127.0.0.1:0", asking)
    with flaky:
        yield flaky, port


def test_tls_by_files_of_certificates(secure, pem):
    _, port = secure
    own, other = ({"tls": pem / "certificate.pem", "cert": pem / f"{name}.pem",
                   "key": pem / f"{name}.key"} for name in ("certificate", "other"))  # fmt: skip
    with Client(f"localhost:{port}", **own) as client:
        assert client.generate("a red circle", steps=1)[0].size == (32, 32)
    faults = [
        ("localhost", {"tls": True}, "of no authority that is trusted"),
        ("localhost", other, "a certificate of the client"),
        ("localhost", {"tls": own["tls"]}, "a certificate of the client"),
        ("127.0.0.1", own, "of another name"),
        ("localhost", {}, "may need TLS"),
    ]
    for host, options, words in faults:
        with (
            Client(f"{host}:{port}", max_retries=0, **options) as client,
            pytest.raises(ServerUnavailable, match=words),
        ):
            client.generate("a red circle")


def test_the_command_has_tls_headers_and_a_key(secure, pem, monkeypatch):
    flaky, port = secure
    monkeypatch.setenv("TWINBRUSH_API_KEY", "secret")
    certificate, key = pem / "certificate.pem", pem / "certificate.key"
    arguments = ["status", f"--server=localhost:{port}", f"--ca={certificate}",
                 f"--cert={certificate}", f"--key={key}", "--header", "X-Team: a:b"]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert flaky.metadata[-1]["authorization"] == "Bearer secret"
    assert flaky.metadata[-1]["x-team"] == "a:b"
    assert CliRunner().invoke(app, [*arguments, "--header=authorization:own"]).exit_code == 0
    assert flaky.metadata[-1]["authorization"] == "own"


def test_the_command_hints_at_serve_where_that_helps():
    (port,) = free_ports(1)
    for server, *flags, helps in (
        (f"127.0.0.1:{port}", True),
        (f"127.0.0.1:{port}", "--tls", False),
        (f"0.0.0.0:{port}", False),  # of another machine, for all that the command knows
    ):
        done = CliRunner().invoke(app, ["status", "--server", server, *flags])
        assert done.exit_code == 1
        assert "no server answers at" in done.stderr
        assert ("`twinbrush serve` starts a server" in done.stderr) is helps


def test_the_gateway_has_tls_headers_and_a_key(secure, pem, start_gateway):
    flaky, port = secure
    certificate, key = pem / "certificate.pem", pem / "certificate.key"
    flags = (f"--ca={certificate}", f"--cert={certificate}", f"--key={key}", "--header=X-Team: a:b")
    env = {"TWINBRUSH_API_KEY": "secret"}
    gateway = start_gateway(f"localhost:{port}", flags=flags, env=env)
    assert gateway.call("/v1/images/generations", {"prompt": "a ring", "steps": 1}).status == 200
    assert flaky.metadata[-1]["authorization"] == "Bearer secret"
    assert flaky.metadata[-1]["x-team"] == "a:b"
    assert gateway.stop() == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tls": "other.key"}, "tls=.*must be a PEM file of certificates"),
        ({"tls": True, "cert": "certificate.pem", "key": "other.key"}, "key=.*must be the private"),
        ({"tls": True, "cert": "certificate.pem"}, "cert=.* needs key"),
        ({"cert": "certificate.pem", "key": "certificate.key"}, "cert=.* needs tls"),
        ({"headers": [("a", "b")]}, "headers=<list> is invalid: must be a mapping"),
        ({"headers": {1: "b"}}, "header=1 is invalid"),
        ({"timeout": "5"}, "timeout='5' is invalid"),
        ({"timeout": None}, "timeout=None is invalid"),
        ({"timeout": -1}, "timeout=-1 is invalid"),
        ({"timeout": float("nan")}, "timeout=nan is invalid"),
        ({"max_retries": "2"}, "max_retries='2' is invalid"),
        ({"max_retries": True}, "max_retries=True is invalid"),
        ({"max_retries": -1}, "max_retries=-1 is invalid"),
        ({"tls": 1}, "tls=1 is invalid"),
        ({"tls": True, "cert": 5, "key": "a"}, "cert=5 is invalid"),
        ({"credentials": 5}, "credentials=5 is invalid"),
        ({"address": 5}, "address=5 is invalid"),
        ({"address": "localhost:99999"}, "address='localhost:99999' is invalid"),
        ({"headers": {"a b": "c"}}, "header='a b' is invalid"),
        ({"headers": {"a-bin": "c"}}, "header='a-bin' is invalid"),
        ({"headers": {"grpc-timeout": "1"}}, "header='grpc-timeout' is invalid"),
        ({"headers": {"a": "secrét"}}, "header='a' is invalid: must have a value of printable"),
    ],
)
def test_what_a_connection_cannot_use_is_named(pem, options, words):
    given = {
        name: pem / value if str(value).endswith((".pem", ".key")) else value
        for name, value in options.items()
    }
    with pytest.raises(InvalidRequest, match=words) as error:
        Client(**{"address": "localhost:8001"} | given)
    assert "secr" not in str(error.value)


@pytest.mark.parametrize("way", ["generate", "stream", "pictures"])
def test_a_timeout_of_a_call_is_a_number(client, way):
    for wrong in ("5", -1, True, float("inf")):
        with pytest.raises(InvalidRequest, match="must be a number of seconds"):
            getattr(client, way)("a ring", timeout=wrong)


def test_pauses_grow_have_jitter_and_heed_the_server():
    connection = Connection(max_retries=9)
    deadline = connection.deadline(100)
    failure = error_of("UNAVAILABLE", "shutting down")
    for attempt in range(8):
        longest = min(0.25 * 2**attempt, 10)
        pauses = {connection.pause(failure, attempt, deadline) for _ in range(20)}
        assert len(pauses) > 1
        assert all(longest / 2 <= pause <= longest for pause in pauses)
    hinted = error_of("UNAVAILABLE", "the queue is full: try again in 7 s")
    assert isinstance(hinted, QueueFull)
    assert 7 < connection.pause(hinted, 0, deadline) <= 7.25
    assert connection.pause(hinted, 0, connection.deadline(5)) is None  # it would come too late
    assert connection.pause(hinted, 9, deadline) is None


def test_a_status_before_a_message_is_the_code():
    error = error_of("UNAVAILABLE", "DEADLINE_EXCEEDED: deadline_ms=5 has passed")
    assert isinstance(error, DeadlineExceeded)
    assert (error.code, str(error)) == ("DEADLINE_EXCEEDED", "deadline_ms=5 has passed")


@pytest.mark.parametrize("code", ["NOT_FOUND", "UNAVAILABLE", ""])
@pytest.mark.parametrize(
    "words",
    ["Request for unknown model: 'text_to_image' has no available versions", "Server is stopping"],
)
def test_a_server_whose_models_are_not_there_yet_or_no_more_is_unavailable(code, words):
    error = error_of(code, words)
    assert isinstance(error, ServerUnavailable)
    assert error.code == "UNAVAILABLE"
    assert str(error) == f"the server is starting or shutting down ({words})"
    assert not isinstance(error_of("NOT_FOUND", "Request for unknown model: 'x' is not found"),
                          ServerUnavailable)  # fmt: skip


def with_async_client(server, use):
    async def run():
        async with AsyncClient(server.address) as client:
            return await use(client)

    return asyncio.run(run())


def test_the_async_client_paints_the_same(server, client):
    async def use(aio):
        assert await aio.ready()
        assert await aio.info() == client.info()
        pictures = await aio.generate(["a ring", "a star"], seed=3, steps=2, deterministic=True)
        stream = aio.stream("a ring", steps=3, preview_every=2, seed=3)
        (picture,) = await aio.pictures("a ring", steps=2, seed=3, deterministic=True)
        assert picture.image.tobytes() == pictures[0].tobytes()
        return pictures, [event async for event in stream]

    pictures, events = with_async_client(server, use)
    expected = client.generate(["a ring", "a star"], seed=3, steps=2, deterministic=True)
    assert [p.tobytes() for p in pictures] == [p.tobytes() for p in expected]
    assert [type(event) for event in events] == [Progress, Preview, Progress, Picture]


def test_the_async_client_raises_the_same_errors(server):
    async def use(aio):
        with pytest.raises(InvalidRequest, match="steps=0 is invalid"):
            await aio.generate("a ring", steps=0)
        with pytest.raises(InvalidRequest, match="steps=0 is invalid"):
            [event async for event in aio.stream("a ring", steps=0)]
        with pytest.raises(DeadlineExceeded, match="within its timeout"):
            await aio.generate("a ring", timeout=0.2, **SLOW)

    with_async_client(server, use)


def test_an_async_client_may_be_made_before_its_loop_and_used_in_several(server):
    client = AsyncClient(server.address)

    def paint(seed):
        (picture,) = asyncio.run(client.pictures("a ring", steps=20, seed=seed))
        return picture.seed

    assert [paint(seed) for seed in (1, 2)] == [1, 2]  # one loop after the other
    with ThreadPoolExecutor(3) as threads:  # at once
        assert list(threads.map(paint, range(6))) == list(range(6))
    asyncio.run(client.close())


@pytest.mark.parametrize("way", ["generate", "stream"])
def test_closing_the_async_client_cancels_its_requests_but_no_task(server, way):
    async def use(aio):
        async def paint():
            if way == "generate":
                return await aio.generate("a ring", **SLOW)
            return [event async for event in aio.stream("a ring", **SLOW)]

        task = asyncio.create_task(paint())
        await asyncio.sleep(0.3)
        await aio.close()
        with pytest.raises(Cancelled, match="the request was cancelled"):
            await task

    with_async_client(server, use)


def test_closing_a_client_cancels_its_streams(server):
    with Client(server.address) as client:
        events = iter(client.stream("a ring", **SLOW))
        next(events)
    with pytest.raises(Cancelled, match="the request was cancelled"):
        list(events)


@pytest.mark.parametrize("way", ["task", "stream", "break"])
def test_leaving_the_async_client_stops_the_work(server, way):
    async def use(aio):
        if way == "task":
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(aio.generate(["a ring", "a star"], **SLOW), 0.3)
            return
        async with aio.stream("a ring", **SLOW) as stream:
            if way == "break":
                async for _ in stream:
                    break
                return
            events = aiter(stream)
            await anext(events)
            stream.cancel()
            with pytest.raises(Cancelled, match="the request was cancelled"):
                await anext(events)

    with work_stops(server):
        with_async_client(server, use)


def test_a_stream_left_after_its_last_picture_lets_the_server_stop(repository, start_server):
    server = start_server(repository)
    server.wait_for("ready in")
    with Client(server.address) as client:
        for seed in range(5):
            with client.stream("a red circle", steps=1, seed=seed) as stream:
                for event in stream:
                    if isinstance(event, Picture):
                        break
    assert server.stop() == 0
    assert "Exit timeout expired" not in server.text()


def test_a_truncated_prompt_warns(client):
    with pytest.warns(UserWarning, match="truncated to the 16 of clip_text"):
        client.generate("very " * 30 + "red circle")
