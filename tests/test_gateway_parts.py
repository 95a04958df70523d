"""The gateway's parts: servers, keys, limits, files, commands."""

from __future__ import annotations

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import pytest
import uvicorn
from fastapi.testclient import TestClient
from harness import free_ports
from typer.testing import CliRunner

from gateway import png_info
from gateway.__main__ import app as command
from gateway.addresses import resolve, split
from gateway.app import Settings, create_app
from gateway.backend import Backend
from gateway.errors import ApiError
from gateway.files import Files
from gateway.gate import Gate
from gateway.keys import Key, KeyFileError, KeyRing, Limits, digest, read_keys
from gateway.limits import Meter
from gateway.pool import Pool, work_of
from gateway.server import DrainingServer
from twinbrush.server.connections import open_connections
from twinbrush_client import (
    Cancelled,
    DeadlineExceeded,
    Picture,
    Progress,
    QueueFull,
    ServerInfo,
    ServerUnavailable,
    TwinbrushError,
)

INFO = ServerInfo(
    version="1", checkpoint="tiny", samplers=["ddim", "euler"], image_formats=["png"],
    defaults={"width": 32, "height": 32, "steps": 4, "num_images": 1},
    sizes={"native": 32, "multiple_of": 8, "largest": 128}, fields=[],
)  # fmt: skip


def dead() -> str:
    return f"127.0.0.1:{free_ports(1)[0]}"


def with_pool(servers, use):
    """Runs `use(pool)` on a started pool."""

    async def run():
        pool = Pool(servers, timeout=60, probe_seconds=600)
        await pool.start()
        try:
            return await use(pool)
        finally:
            await pool.close()

    return asyncio.run(run())


def test_a_lost_server_is_left_alone_and_its_request_goes_to_another(server):
    lost = dead()

    async def use(pool):
        backends = {backend.address: backend for backend in pool.backends}
        backends[lost].succeeded()  # as if it had just been well, on the same checkpoint
        backends[lost].info = backends[server.address].info
        backends[server.address].outstanding = 10  # so that the lost one is asked first
        events = [event async for event in pool.stream("a red circle", steps=3, seed=1)]
        return events, {name: backend.healthy for name, backend in backends.items()}

    events, healthy = with_pool([lost, server.address], use)
    assert [type(event) for event in events] == [Progress] * 3 + [Picture]
    assert healthy == {lost: False, server.address: True}


@pytest.mark.parametrize("progress", [True, False])
def test_a_job_that_is_cancelled_says_so(server, progress):
    async def use(pool):
        job = pool.stream(
            "a red circle", steps=50, width=128, height=128, num_images=1, progress=progress
        )
        asyncio.get_running_loop().call_later(0.02, job.cancel)
        async for _ in job:
            pass

    with pytest.raises(Cancelled, match="was cancelled"):
        with_pool([server.address], use)


def test_a_picture_without_progress_is_the_same(server):
    async def use(pool):
        fields = {"steps": 3, "seed": 1, "num_images": 1, "deterministic": True}
        jobs = [pool.stream("a ring", progress=progress, **fields) for progress in (True, False)]
        return [[event async for event in job] for job in jobs]

    streamed, answered = with_pool([server.address], use)
    assert [type(event) for event in answered] == [Picture]
    assert answered[0].data == streamed[-1].data


def test_without_a_server_live_is_yes_and_ready_is_no():
    with TestClient(create_app(Pool([dead()], 5), Settings(page=False), Gate())) as client:
        assert client.get("/health/live").status_code == 200
        assert client.get("/health/ready").status_code == 503
        answer = client.post("/v1/images/generations", json={"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_unavailable")
        assert answer.headers["retry-after"] == "2"


def backends(*outstanding: float) -> Pool:
    """A pool of servers that are well and have so much work."""
    pool = Pool([], 5)
    for number, work in enumerate(outstanding):
        backend = Backend(f"127.0.0.1:{number + 1}", 5)
        backend.info, backend.outstanding = INFO, work
        backend.succeeded()
        vars(pool)["_backends"][backend.address] = backend
    return pool


def test_a_server_that_does_not_answer_well_is_left_once_it_has_no_work():
    """One that drains waits for clients that are connected."""
    server = grpc.server(ThreadPoolExecutor(1))  # which answers that it knows no call
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()

    async def run():
        backend = Backend(f"127.0.0.1:{port}", 5)
        with backend.working(1):
            await backend.probe()
            assert open_connections([port])
        await backend.probe()
        async with asyncio.timeout(10):
            while open_connections([port]):
                await asyncio.sleep(0.02)
        with pytest.raises(TwinbrushError) as refused:
            await backend.client.info()
        assert refused.value.code != "FAILED_PRECONDITION"  # as of a client that is closed
        await backend.client.close()

    asyncio.run(run())
    server.stop(None)


def test_the_server_with_the_least_work_is_chosen_and_equals_take_turns():
    async def run():
        pool = backends(3, 1, 1)
        first, second = (pool.choose(None, set()).address for _ in range(2))
        assert {first, second} == {"127.0.0.1:2", "127.0.0.1:3"}
        assert pool.choose(None, {first, second}).address == "127.0.0.1:1"
        pool.backends[1].eject()
        assert {pool.choose("tiny", set()).address for _ in range(3)} == {"127.0.0.1:3"}
        assert pool.choose("other", set()) is None
        assert pool.choose(None, {b.address for b in pool.backends[::2]}).address == "127.0.0.1:2"

    asyncio.run(run())


def test_an_ejected_server_returns_after_a_while(monkeypatch):
    async def run():
        now = 100.0
        monkeypatch.setattr("gateway.backend.time.monotonic", lambda: now)
        (backend,) = backends(0).backends
        for hold in (1, 2, 4):
            backend.eject()
            now += hold - 0.1
            assert not backend.healthy
            now += 0.2
            assert backend.healthy

    asyncio.run(run())


def test_all_addresses_of_a_name_are_servers(monkeypatch):
    async def named(self, host, port, **_):
        found = {"both": [(2, "10.0.0.2"), (2, "10.0.0.1"), (10, "::2")], "six": [(10, "::2")]}
        return [(family, 1, 6, "", (address, port)) for family, address in found[host]]

    async def run():
        loop = type(asyncio.get_running_loop())
        monkeypatch.setattr(loop, "getaddrinfo", named)
        assert await resolve("both:1") == ["10.0.0.1:1", "10.0.0.2:1"]
        assert await resolve("six:1") == ["[::2]:1"]
        assert await resolve("localhost:1") == ["localhost:1"]
        assert await resolve("[::1]:1") == ["[::1]:1"]

    asyncio.run(run())


def test_what_fails_at_every_look_is_logged_once(monkeypatch, caplog):
    async def unknown(self, host, port, **_):
        raise OSError("unknown")

    async def broken(self):
        raise RuntimeError("broken")

    async def run():
        monkeypatch.setattr(type(asyncio.get_running_loop()), "getaddrinfo", unknown)
        pool = Pool(["nowhere:1"], timeout=60, probe_seconds=0.001)
        await pool.start()
        await asyncio.sleep(0.05)
        monkeypatch.setattr(Pool, "probe", broken)
        await asyncio.sleep(0.05)
        await pool.close()

    asyncio.run(run())
    assert [record.getMessage() for record in caplog.records] == [
        "the name of nowhere:1 is not known: unknown", "looking at the servers fails",
    ]  # fmt: skip


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:0", "host:x", "host:65536"])
def test_a_server_that_is_no_address_is_refused(address):
    with pytest.raises(ValueError, match="must be host:port"):
        split(address)


def test_work_is_steps_of_pictures_at_the_native_size():
    assert work_of({}, INFO) == 4
    assert work_of({"num_images": 3, "steps": 10, "width": 64, "height": None}, INFO) == 60


def test_keys_are_found_by_their_hashes():
    ring = KeyRing([Key("ann", digest("a" * 20), Limits())], Limits())
    assert ring.find(f"Bearer {'a' * 20}").client == "ann"
    for wrong in (None, "", "Bearer", f"Bearer {'a' * 21}", f"Digest {'a' * 20}", "Basic x"):
        assert ring.find(wrong) is None
    anonymous = KeyRing([], Limits()).find(None)
    assert (anonymous.name, anonymous.client) == ("anonymous", None)


def test_a_file_of_keys_has_limits_of_its_own(tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text(f'[ann]\nsha256 = "{"0" * 64}"\nconcurrent = 2\n[bob]\nsha256 = "{"1" * 64}"\n')
    ann, bob = read_keys(file, Limits(concurrent=5, work=7))
    assert (ann.limits, bob.limits) == (Limits(None, 2, 7), Limits(None, 5, 7))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "has none"),
        ("x", "keys of"),
        (f"['a b']\nsha256 = '{'0' * 64}'", "must be named by"),
        ("ann = 1", "must be a table"),
        ("[ann]\nsha256 = 'x'", "64 hexadecimal digits"),
        (f"[ann]\nsha256 = '{'0' * 64}'\nrate = 1", "has rate; known are sha256"),
        (f"[ann]\nsha256 = '{'0' * 64}'\nwork = 0", "work=0 must be a number above 0"),
        (f"[ann]\nsha256 = '{'0' * 64}'\nwork = inf", "work=inf must be a number above 0"),
        (f"[a]\nsha256 = '{'0' * 64}'\nrequests_per_minute = nan", "nan must be a number above 0"),
        (f"[a]\nsha256 = '{'0' * 64}'\nconcurrent = 1.5", "1.5 must be an integer above 0"),
    ],
)
def test_a_file_of_keys_that_is_wrong_is_refused(tmp_path, text, error):
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(KeyFileError, match=error):
        read_keys(file, Limits())


def test_a_key_is_one_callers(monkeypatch, tmp_path):
    file = tmp_path / "keys.toml"
    secret = "a" * 20
    monkeypatch.setenv("TWINBRUSH_API_KEYS", secret)
    for entry, words in (
        ("ann", "key-1 and ann are the same key"),
        ("key-1", "two keys are named"),
    ):
        file.write_text(f'[{entry}]\nsha256 = "{digest(secret)}"\n')
        refused = CliRunner().invoke(command, ["--keys-file", str(file)])
        assert refused.exit_code == 2
        assert words in refused.stderr


def test_a_made_key_opens_what_its_entry_locks(tmp_path):
    made = CliRunner().invoke(command, ["hash-key", "ann"])
    key = re.search(r"key: (\S+)", made.stderr)[1]
    file = tmp_path / "keys.toml"
    file.write_text(made.stdout)
    ring = KeyRing(read_keys(file, Limits()), Limits())
    assert ring.find(f"Bearer {key}").name == "ann"
    typed = CliRunner().invoke(command, ["hash-key", "ann", "--stdin"], input=f"{key}\n")
    assert typed.stdout == made.stdout
    assert CliRunner().invoke(command, ["hash-key", "ann", "--stdin"], input="abc\n").exit_code == 2


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--host", "0.0.0.0"], "or --no-keys to let everybody in"),
        (["--server", "x"], "must be host:port"),
        (["--keys-file", "none.toml"], "keys of none.toml"),
        (["--ssl-certfile", "none.pem"], "--ssl-certfile none.pem: No such file"),
        (["--ssl-certfile", __file__, "--ssl-keyfile", __file__], "--ssl-keyfile"),
        (["--ssl-keyfile", "key.pem"], "--ssl-keyfile needs --ssl-certfile"),
        (["--ca", "none.pem"], "none.pem: No such file"),
        (["--ca", __file__], "must be a PEM file of certificates"),
        (["--tls", "--cert", "cert.pem"], "needs key"),
        (["--cert", "cert.pem", "--key", "key.pem"], "needs tls"),
        (["--header", "secret"], "must be NAME:VALUE"),
        (["--cors-origin", "https://app.example/"], "https://app.example/ must be an origin"),
        (["--cors-origin", "app.example"], "app.example must be an origin such as https://"),
        (["--timeout", "inf"], "--timeout inf must be a finite number"),
        (["--files-seconds", "inf"], "--files-seconds inf must be"),
        (["--public-url", "app.example"], "app.example must be a URL such as https://"),
    ],
)
def test_a_gateway_that_would_be_wrong_does_not_start(options, error):
    refused = CliRunner().invoke(command, options)
    assert refused.exit_code == 2
    assert error in refused.stderr


def test_a_rate_lets_a_minute_through_and_then_says_when():
    now = 0.0
    meter, key = Meter(lambda: now), Key("ann", "", Limits(requests_per_minute=2))

    def send():
        with meter.admit(key, 1):
            pass

    send(), send()
    with pytest.raises(ApiError, match="2 requests a minute") as error:
        send()
    assert (error.value.status, error.value.retry_after) == (429, 30)
    assert list(meter.headers(key).values()) == ["2", "0", "1m0s"]
    now = 29.5
    assert list(meter.headers(key).values()) == ["2", "0", "30.5s"]
    now = 30.0
    send()
    with pytest.raises(ApiError):
        send()
    now = 89.99
    assert list(meter.headers(key).values()) == ["2", "1", "10ms"]
    assert meter.headers(Key("bob", "", Limits())) == {}


def test_live_requests_and_their_work_are_bounded():
    meter = Meter()
    two, work = Key("two", "", Limits(concurrent=2)), Key("work", "", Limits(work=10))
    third = meter.admit(two, 1)
    with meter.admit(two, 1), meter.admit(two, 1), pytest.raises(ApiError, match="2 requests"):
        third.__enter__()
    with meter.admit(two, 1), meter.admit(work, 6):
        with pytest.raises(ApiError, match="6 steps") as error, meter.admit(work, 5):
            pass
        assert error.value.status == 429
        with meter.admit(work, 4):
            pass
    with pytest.raises(ApiError) as error, meter.admit(work, 11):
        pass
    assert error.value.status == 400


def test_files_are_signed_expire_and_are_bounded():
    now = 0.0
    files = Files(100, 10, lambda: now)

    def parts(url):
        name, expires, signature = re.fullmatch(
            r"(.*)\?expires=(\d+)&signature=(\w+)", url
        ).groups()
        return name, int(expires), signature

    first = parts(files.add(b"a" * 60, "png"))
    assert files.find(*first).data == b"a" * 60
    assert files.find(first[0], first[1] + 1, first[2]) is None
    assert files.find(first[0], first[1], "é" * 64) is None
    second = parts(files.add(b"b" * 60, "png"))
    assert files.find(*first) is None
    assert files.bytes == 60
    now = 10.0
    assert files.find(*second) is None
    assert files.bytes == 0
    with pytest.raises(ValueError, match="101 bytes"):
        files.add(b"c" * 101, "png")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFull("RESOURCE_EXHAUSTED", "the queue is full", 2.5), 429, "queue_full"),
        (ServerUnavailable("UNAVAILABLE", "draining"), 503, "server_unavailable"),
        (DeadlineExceeded("DEADLINE_EXCEEDED", "late"), 504, "deadline_exceeded"),
        (TwinbrushError("INTERNAL", "a fault"), 500, "server_error"),
    ],
)
def test_errors_of_servers_have_their_status_and_say_when_to_try_again(error, status, code):
    made = ApiError.of(error)
    answers = made.response("/v1/images/generations"), made.response("/sdapi/v1/txt2img")
    assert {answer.status_code for answer in answers} == {status}
    assert json.loads(answers[0].body)["error"]["code"] == code
    assert json.loads(answers[1].body)["detail"] == str(error)
    wanted = {429: "3", 503: "1"}.get(status)
    assert answers[0].headers.get("retry-after") == wanted


def test_a_pool_without_servers_is_unavailable():
    async def use(pool):
        await pool.info()

    with pytest.raises(ServerUnavailable, match="no server answers"):
        with_pool([dead()], use)


def test_connections_that_send_no_request_are_closed_in_time():
    closed = []

    class Connection:
        def __init__(self, **cycle):
            vars(self).update(cycle)
            self.transport = SimpleNamespace(close=lambda: closed.append(self))

    done, running = (
        SimpleNamespace(response_complete=True),
        SimpleNamespace(response_complete=False),
    )
    silent, idle, busy = Connection(cycle=None), Connection(cycle=done), Connection(cycle=running)
    often, socket = Connection(cycle=done), Connection()  # a web socket has no cycle
    server = DrainingServer(uvicorn.Config(print), Gate(), None, 30)
    server.server_state.connections = [silent, idle, busy, often, socket]
    for second in (0, 10, 20):
        often.cycle = SimpleNamespace(response_complete=True)  # of another request
        server._close_idle(second)
    assert closed == []
    server._close_idle(21)
    assert closed == [silent, idle]
    server._close_idle(60)
    assert busy not in closed
    assert often in closed


def test_a_body_that_does_not_come_ends_its_request(monkeypatch):
    monkeypatch.setattr("gateway.guard.BODY_SECONDS", 0.05)
    asked, sent = [], []

    async def receive():
        asked.append(1)
        if len(asked) > 1:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": b"{", "more_body": True}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/images/generations", "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "http_version": "1.1",
        "scheme": "http", "server": ("a", 1), "client": ("a", 1), "root_path": "",
    }  # fmt: skip
    app = create_app(Pool([], 1), Settings(), Gate())
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 408
    assert b"nothing of the body has come for 0.05 s" in sent[1]["body"]


@pytest.mark.parametrize("rest", ["a" * 10**6, " " * 10**6, '"' * 10**6])
def test_a_text_that_is_no_list_of_pairs_takes_no_time_to_read(rest):
    found = png_info.parameters(f"a ring\nSteps: 4, {rest}")
    assert found == {"Prompt": "a ring", "Negative prompt": "", "Steps": "4"}
