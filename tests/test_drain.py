"""The end of a server: a drain that loses nothing, a second signal, and an engine gone silent."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request

import pytest
from harness import free_ports
from test_server import victim_of
from tritonclient.grpc import InferenceServerClient

from twinbrush_client import Client, Picture, TwinbrushError
from twinbrush_client.wire import inputs

NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def state(port: int, path: str = "/ready") -> tuple[int, str]:
    """Code and state that the launcher's health endpoint answers."""
    try:
        with NO_PROXY.open(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, json.load(answer)["state"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["state"]


class Behind:
    """Clients that take turns between servers, and retry only what is UNAVAILABLE."""

    def __init__(self, addresses: list[str]):
        self._addresses = addresses
        self.lost: list[str] = []
        self.served = self.retried = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(k,)) for k in range(4)]
        for thread in self._threads:
            thread.start()

    def _run(self, offset: int) -> None:
        clients = [Client(address, timeout=60, max_retries=0) for address in self._addresses]
        turns = itertools.islice(itertools.cycle(clients), offset, None)
        while not self._stop.is_set():
            until = time.monotonic() + 60
            while True:
                try:
                    next(turns).generate("a red circle", steps=10, image_format="png")
                    self.served += 1
                    break
                except TwinbrushError as error:
                    if error.code != "UNAVAILABLE" or time.monotonic() > until:
                        self.lost.append(str(error))
                        return
                    self.retried += 1
                    time.sleep(0.05)
        for client in clients:
            client.close()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_a_rolling_restart_behind_two_servers_loses_nothing(repository, start_server):
    first, second = start_server(repository), start_server(repository)
    for server in (first, second):
        server.wait_for("ready in")
    clients = Behind([first.address, second.address])
    try:
        for server in (first, second):
            time.sleep(1)
            ports = ["--http-port", server.http, "--grpc-port", server.grpc]
            assert server.stop() == 0
            assert "draining" in server.text()
            assert "not all live requests" not in server.text()
            if server is first:
                start_server(repository, *map(str, ports)).wait_for("ready in")
                time.sleep(0.5)
                served = clients.served
        # The restarted one alone serves now.
        until = time.monotonic() + 30
        while clients.served < served + 8 and not clients.lost and time.monotonic() < until:
            time.sleep(0.1)
    finally:
        clients.stop()
    assert clients.lost == []
    assert clients.served >= served + 8
    assert clients.retried > 0


def test_a_drain_is_not_ready_refuses_new_requests_and_a_second_signal_ends_it(
    repository, start_server
):
    port = free_ports(1)[0]
    server = start_server(repository, "--health-port", str(port), "--drain-seconds", "200")
    until = time.monotonic() + 30
    while True:
        try:
            assert state(port) == (503, "starting")
            break
        except urllib.error.URLError:
            assert time.monotonic() < until, server.text()
            time.sleep(0.1)
    server.wait_for("ready in")
    assert state(port) == (200, "ready")
    codes = []

    def wait_for_answer():
        with Client(server.address, max_retries=0) as client:
            try:
                client.generate("a red circle", num_images=16, steps=50, width=128, height=128)
                codes.append("OK")
            except TwinbrushError as error:
                codes.append(error.code)

    waiting = [threading.Thread(target=wait_for_answer, daemon=True) for _ in range(3)]
    for thread in waiting:
        thread.start()
    time.sleep(1)
    assert codes == [], "the requests must be live"
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("draining", 5)
    assert state(port) == (503, "draining")
    assert state(port, "/live") == (200, "draining")
    time.sleep(1)  # the engine looks twice a second
    with Client(server.address, max_retries=0) as client, pytest.raises(TwinbrushError) as refused:
        client.generate("a red circle")
    assert refused.value.code == "UNAVAILABLE"
    assert str(refused.value).startswith("the server is shutting down")
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 0
    assert "not all live requests have ended" in server.text()
    for thread in waiting:
        thread.join(10)
    assert len(codes) == len(waiting)
    assert "UNAVAILABLE" in codes
    assert set(codes) <= {"OK", "UNAVAILABLE"}


def test_a_server_that_has_just_become_ready_drains_too(repository, start_server):
    server = start_server(repository)
    server.wait_until_ready()
    with Client(server.address, max_retries=0) as client:
        events = iter(client.stream("a red circle", steps=50))
        next(events)
        server.process.send_signal(signal.SIGTERM)  # the launcher may not know yet
        assert isinstance(list(events)[-1], Picture)
    assert server.process.wait(30) == 0


def test_a_server_whose_engine_is_silent_is_ended(repository, start_server):
    server = start_server(repository, "--heartbeat-timeout", "2")
    server.wait_for("ready in")
    time.sleep(1)
    os.kill(victim_of(server, "text_to_image_stream"), signal.SIGSTOP)
    assert server.process.wait(30) == 1
    assert "text_to_image_stream has given no sign of life for " in server.text()


def test_a_drain_waits_for_a_client_that_reads_its_stream_slowly(repository, start_server):
    server = start_server(repository)
    server.wait_for("metrics http")
    events, ended = [], threading.Event()

    def read(result, error):
        time.sleep(0.1)
        final = error or result.get_response().parameters["triton_final_response"].bool_param
        events.append(error or (None if final else result.as_numpy("event")[0]))
        if final:
            ended.set()

    with InferenceServerClient(server.address) as client:
        client.start_stream(read)
        fields = inputs({"prompt": "a red circle", "steps": 20, "num_images": 2})
        client.async_stream_infer("text_to_image_stream", fields, enable_empty_final_response=True)
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        assert ended.wait(30)
    assert events.count(b"image") == 2
    assert events[-1] is None
    assert server.process.wait(10) == 0
    assert "waiting until clients have read their answers" in server.text()
