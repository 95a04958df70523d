"""The socket between the front doors' processes, on the real engine."""

from __future__ import annotations

import queue
import socket
import time
import uuid

import numpy as np
import pytest

from twinbrush.engine.admission import LONGEST_HOLD
from twinbrush.engine.generation import EngineError, Finished
from twinbrush.engine.request import GenerationRequest
from twinbrush.triton.relay import LENGTHS, RelayClient, RelayServer, _frame

WAIT = 60  # seconds


def fields(**given) -> dict[str, np.ndarray]:
    types = {str: object, int: np.int32, float: np.float32, bool: bool}
    given = {"prompt": "a red circle", "progress": False, "image_format": "png", **given}
    return {
        name: np.array([v.encode() if isinstance(v, str) else v], types[type(v)])
        for name, v in given.items()
    }


class Relay:
    def __init__(self, engine, address: str):
        self.engine, self.address = engine, address
        self.server = self.serve()
        self.client = RelayClient(address)

    def serve(self) -> RelayServer:
        def submit(given, reply, origin):
            request = GenerationRequest.parse(given, self.engine.config)
            return self.engine.submit(request, reply, origin)

        return RelayServer(self.address, submit)

    def ask(self, **given) -> tuple[int, queue.SimpleQueue]:
        ticket, answers = self.client.new_ticket(), queue.SimpleQueue()
        self.client.submit(ticket, fields(**given), answers.put)
        return ticket, answers


@pytest.fixture
def relay(engine):
    relay = Relay(engine, f"\0twinbrush-test-{uuid.uuid4().hex}")
    yield relay
    relay.client.close()
    relay.server.close()


def test_images_come_back_in_order_with_every_field(relay):
    _, answers = relay.ask(num_images=3, seed=5, steps=2, guidance_scale=2.5, prompt="élan\n")
    images = answers.get(timeout=WAIT)
    assert [(type(i), i.index, i.seed) for i in images] == [(Finished, k, 5 + k) for k in range(3)]
    assert all(image.image.startswith(b"\x89PNG") for image in images)


def test_many_at_once_get_their_own(relay):
    asked = [relay.ask(seed=seed, steps=1 + seed % 5)[1] for seed in range(40)]
    assert [answers.get(timeout=WAIT)[0].seed for answers in asked] == list(range(40))


def test_errors_keep_their_code(relay):
    error = relay.ask(steps=0)[1].get(timeout=WAIT)
    assert isinstance(error, EngineError)
    assert (error.code, "steps=0 is invalid" in str(error)) == ("INVALID_ARG", True)


def test_a_full_queue_is_remembered_for_as_long_as_the_engine_says(relay, monkeypatch):
    def refuse(*_):
        raise EngineError("RESOURCE_EXHAUSTED", "the queue is full", 9.0, "queue_full", hold)

    monkeypatch.setattr(relay.engine, "submit", refuse)
    hold = 0.0
    assert relay.ask()[1].get(timeout=WAIT).code == "RESOURCE_EXHAUSTED"
    assert relay.client.refusal is None
    hold = 5.0  # which no engine says
    assert relay.ask()[1].get(timeout=WAIT).code == "RESOURCE_EXHAUSTED"
    first, second = relay.client.refusal, relay.client.refusal
    assert first is not second, "each is raised once"
    assert (first.code, str(first)) == ("RESOURCE_EXHAUSTED", "the queue is full")
    time.sleep(LONGEST_HOLD)
    assert relay.client.refusal is None


def test_an_unforeseen_error_fails_its_request_alone(relay, monkeypatch, caplog):
    monkeypatch.setattr(relay.engine, "submit", lambda *_: 1 / 0)
    assert relay.ask()[1].get(timeout=WAIT).code == "INTERNAL"
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    assert relay.ask(seed=1)[1].get(timeout=WAIT)[0].seed == 1


def test_a_cancel_ends_its_request_and_no_other(relay):
    ticket, left = relay.ask(steps=50, num_images=16)
    _, kept = relay.ask(steps=3, seed=2)
    relay.client.cancel(ticket)
    assert left.get(timeout=WAIT).code == "CANCELLED"
    assert kept.get(timeout=WAIT)[0].seed == 2
    relay.client.cancel(ticket)  # has ended: nothing happens


def test_a_client_that_goes_frees_the_engine(relay):
    relay.ask(steps=50, num_images=16)
    relay.ask(steps=50, num_images=16)
    relay.client.close()
    other = RelayClient(relay.address)
    relay.client = other
    assert relay.ask(steps=1, seed=3)[1].get(timeout=WAIT)[0].seed == 3


def test_an_engine_that_closes_says_so(relay):
    _, answers = relay.ask(steps=50, num_images=16)
    relay.engine.close()
    error = answers.get(timeout=WAIT)
    assert (error.code, str(error)) == ("UNAVAILABLE", "the server is shutting down")


@pytest.mark.parametrize(
    "last_words",
    [
        b"",
        b"\1\0",
        _frame({"ticket": 0})[:12],
        _frame({"ticket": 0}, b"an image")[:-3],
        LENGTHS.pack(2**32 - 1, 0),
    ],
)
def test_a_lost_engine_is_reported_and_found_again(relay, last_words):
    address = relay.address + "-lost"
    client, answers = RelayClient(address), queue.SimpleQueue()
    with socket.socket(socket.AF_UNIX) as lost:
        lost.bind(address)
        lost.listen()
        client.submit(client.new_ticket(), fields(), answers.put)
        connection, _ = lost.accept()
        connection.recv(10_000)  # else closing is a reset, which drops what was sent
        connection.sendall(last_words)
        connection.close()
    error = answers.get(timeout=WAIT)
    assert (error.code, str(error)) == ("UNAVAILABLE", "the engine went away")
    relay.address, relay.client = address, client
    server = relay.serve()
    assert relay.ask(steps=1, seed=4)[1].get(timeout=WAIT)[0].seed == 4
    server.close()


def test_a_request_that_was_cut_short_harms_nobody(relay, capfd):
    with socket.socket(socket.AF_UNIX) as cut:
        cut.connect(relay.address)
        cut.sendall(_frame({"ticket": 0, "fields": []})[:-3])
    assert relay.ask(steps=1, seed=6)[1].get(timeout=WAIT)[0].seed == 6
    assert "Traceback" not in capfd.readouterr().err


def test_a_frame_that_is_too_large_is_not_read(relay):
    with socket.socket(socket.AF_UNIX) as huge:
        huge.connect(relay.address)
        huge.sendall(LENGTHS.pack(16, 2**31) + bytes(4096))
        huge.settimeout(WAIT)
        assert huge.recv(1) == b""  # the connection was closed
    assert relay.ask(steps=1, seed=7)[1].get(timeout=WAIT)[0].seed == 7


def test_without_an_engine_a_request_is_refused():
    client = RelayClient(f"\0twinbrush-test-{uuid.uuid4().hex}")
    with pytest.raises(EngineError, match="is text_to_image_stream loaded") as error:
        client.submit(client.new_ticket(), fields(), print)
    assert error.value.code == "UNAVAILABLE"


def test_two_engines_cannot_share_an_address(relay):
    with pytest.raises(OSError, match=r"one listens already .*in use.* unload it first"):
        relay.serve()
