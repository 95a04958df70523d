"""The engine under fault: failed calls, dead threads, hung networks, full queues, deadlines."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from harness import open_engine
from test_engine import Client, Watched, request

from twinbrush.engine import engine as engine_module
from twinbrush.engine.generation import EngineError
from twinbrush.engine.limits import Limits


@pytest.fixture
def watched(repository) -> Watched:
    return Watched(repository)


def together(engine, watched: Watched, requests) -> list[Client]:
    """Submits requests while a first one holds the UNet, so that they share a call."""
    entered, go_on = threading.Event(), threading.Event()
    before = watched.before_unet

    def hold(inputs):
        entered.set()
        assert go_on.wait(30)
        watched.before_unet = before
        before(inputs)

    watched.before_unet = hold
    first = Client(engine, request(engine, steps=1, width=16))
    assert entered.wait(30)
    clients = [Client(engine, wanted) for wanted in requests]
    while len(engine._batcher) < len(clients):
        time.sleep(0.001)
    go_on.set()
    first.wait()
    return clients


def test_a_bad_row_fails_its_own_request_and_leaves_the_noise_of_others(repository, watched):
    engine = open_engine(repository, watched)
    requests = [
        request(engine, seed=seed, steps=3, sampler="lcm", guidance_scale=1.0) for seed in range(8)
    ]
    alone = [Client(engine, wanted).images for wanted in requests]
    guilty = request(engine, "the guilty one", steps=3, guidance_scale=1.0, seed=99)
    bad: list[np.ndarray] = []

    def refuse(inputs):
        if any(np.array_equal(row, bad[0]) for row in inputs["encoder_hidden_states"]):
            raise RuntimeError("a bad row")

    (encoded,) = engine._conditioner([engine._plan.texts(guilty)])
    bad.append(encoded["encoder_hidden_states"][0])
    watched.before_unet = refuse
    clients = together(engine, watched, [*requests[:5], guilty, *requests[5:]])
    assert clients.pop(5).error.code == "INTERNAL"
    for client, images in zip(clients, alone, strict=True):
        assert client.error is None
        difference = np.abs(_pixels(client.images[0]) - _pixels(images[0]))
        assert difference.max() <= 1
    engine.close()


def test_nobody_joins_the_halves_of_a_failed_call(repository, watched):
    limits = Limits(max_rows=4)
    engine = open_engine(repository, watched, limits=limits, one_call_at_a_time=True)
    guilty = request(engine, "the guilty one", steps=3, guidance_scale=1.0, seed=99)
    (encoded,) = engine._conditioner([engine._plan.texts(guilty)])
    bad, failed = encoded["encoder_hidden_states"][0], []

    def refuse(inputs):
        if any(np.array_equal(row, bad) for row in inputs["encoder_hidden_states"]):
            failed.append(len(inputs["sample"]))
            raise RuntimeError("a bad row")

    watched.before_unet = refuse
    others = [request(engine, seed=seed, steps=3, guidance_scale=1.0) for seed in range(16)]
    clients = together(engine, watched, [guilty, *others])
    assert [client.error is None for client in clients] == [False] + [True] * 16
    assert failed == [4, 2, 1]
    engine.close()


def _pixels(image: bytes) -> np.ndarray:
    from test_engine import pixels

    return pixels(image)


def test_exhausted_memory_lowers_the_rows_of_later_calls(repository, watched, caplog):
    engine = open_engine(repository, watched, limits=Limits(max_rows=16))

    def refuse(inputs):
        if len(inputs["sample"]) > 4:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 1")

    watched.before_unet = refuse
    requests = [request(engine, seed=seed, steps=2, guidance_scale=1.0) for seed in range(12)]
    clients = together(engine, watched, requests)
    assert [client.error for client in clients] == [None] * 12
    assert "ran out of memory" in caplog.text
    watched.calls.clear()
    for client in [Client(engine, wanted) for wanted in requests]:
        assert client.error is None
    assert max(watched.calls) <= 4
    engine.close()


@pytest.mark.parametrize("loop", ["_encode", "_denoise", "_reply"])
def test_a_thread_that_dies_ends_every_request(repository, monkeypatch, loop):
    reasons: list[str] = []
    engine = open_engine(repository)
    broken = {
        "_encode": (engine._intake, "encode"),
        "_denoise": (engine._batcher, "schedule"),
        "_reply": (engine._to_reply, None),
    }[loop]
    if broken[1] is None:
        engine._to_reply.put("no event")
    else:
        monkeypatch.setattr(*broken, lambda *_: 1 / 0)
    engine._fail = reasons.append
    if loop == "_reply":
        until = time.monotonic() + 30
        while engine._closed is None:
            assert time.monotonic() < until
            time.sleep(0.01)
    else:
        error = Client(engine, request(engine)).error
        assert error.code == "INTERNAL"
        assert "died" in str(error)
    with pytest.raises(EngineError, match="the engine has stopped"):
        Client(engine, request(engine))


def test_the_decoder_thread_that_dies_ends_every_request(repository, monkeypatch):
    engine = open_engine(repository)
    monkeypatch.setattr(engine._decoder, "_decode", lambda group: 1 / 0)
    assert "died" in str(Client(engine, request(engine, steps=1)).error)


def test_a_network_that_hangs_is_noticed(repository, watched):
    reasons: list[str] = []
    release = threading.Event()
    watched.before_unet = lambda inputs: release.wait(30)
    engine = open_engine(
        repository, watched, limits=Limits(call_seconds=1), fail=reasons.append
    )  # fmt: skip
    client = Client(engine, request(engine, steps=1))
    until = time.monotonic() + 20
    while not reasons:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert reasons == ["unet has not answered for 1 s"]
    release.set()
    assert client.error is None
    engine.close()


def test_the_heart_beats_while_the_engine_is_well(repository):
    beats: list[float] = []
    engine = open_engine(repository, beat=lambda: beats.append(time.monotonic()))
    until = time.monotonic() + 20
    while len(beats) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    engine.close()


def test_work_is_bounded_and_one_large_request_is_taken_alone(repository, watched):
    engine = open_engine(repository, watched, limits=Limits(queue_work=100))
    hold = threading.Event()
    watched.before_unet = lambda inputs: hold.wait(30)
    large = Client(engine, request(engine, steps=50, num_images=2, guidance_scale=3.0))
    with pytest.raises(EngineError, match=r"units of work.*retry after \d+ s") as refused:
        Client(engine, request(engine, steps=1, guidance_scale=1.0))
    assert refused.value.code == "RESOURCE_EXHAUSTED"
    assert refused.value.retry_after >= 1
    large.generation.cancel()
    hold.set()
    assert large.error.code == "CANCELLED"
    assert engine._admission.outstanding == 0
    assert Client(engine, request(engine, steps=1)).error is None
    engine.close()


def test_a_full_queue_is_known_before_a_request_is_read(repository, watched):
    engine = open_engine(repository, watched, limits=Limits(queue_size=1))
    engine.check_room()
    hold = threading.Event()
    watched.before_unet = lambda inputs: hold.wait(30)
    held = Client(engine, request(engine, steps=2, guidance_scale=1.0))
    with pytest.raises(EngineError, match="the queue is full") as unknown:
        engine.check_room()
    assert unknown.value.hold == 0, "no pace is known"
    engine._admission.observe(1, 5.0)  # two units are left
    with pytest.raises(EngineError, match="retry after 10 s") as refused:
        engine.check_room()
    assert (refused.value.code, refused.value.reason) == ("RESOURCE_EXHAUSTED", "queue_full")
    assert refused.value.hold == pytest.approx(0.2)  # 2% of the time that the queue takes
    engine._admission.pace = 1000.0
    with pytest.raises(EngineError) as refused:
        engine.check_room()
    assert refused.value.hold == 0.25
    hold.set()
    assert held.error is None
    engine.check_room()
    engine.drain(0)
    with pytest.raises(EngineError, match="shutting down"):
        engine.check_room()
    engine.close()


def test_one_client_has_a_share_of_the_queue_and_leaves_the_rest(repository, watched):
    engine = open_engine(repository, watched, limits=Limits(queue_size=8, queue_work=100))
    hold = threading.Event()
    watched.before_unet = lambda inputs: hold.wait(30)

    def ask(client, steps):
        return Client(engine, request(engine, steps=steps, guidance_scale=1.0, client=client))

    taken = [ask("ada", 45), ask("ada", 1), ask("ada", 1), ask("ada", 1)]
    with pytest.raises(EngineError, match=r"client='ada'.*4 of 4 requests.*after \d+ s") as refused:
        ask("ada", 1)
    assert refused.value.code == "RESOURCE_EXHAUSTED"
    assert refused.value.retry_after >= 1
    taken.append(ask("bob", 50))
    with pytest.raises(EngineError, match=r"client='bob'.*50 of 50 units of work"):
        ask("bob", 1)
    taken += [ask("", 1), ask("", 1)]
    for client in taken:
        client.generation.cancel()
    hold.set()
    assert {client.error.code for client in taken} == {"CANCELLED"}
    assert Client(engine, request(engine, steps=1, client="ada")).error is None
    engine.close()


def test_a_clients_only_request_is_taken_whatever_its_work(repository):
    engine = open_engine(repository, limits=Limits(queue_size=1, queue_work=4, client_work=1))
    assert Client(engine, request(engine, steps=4, guidance_scale=1.0, client="ada")).error is None
    engine.close()


def test_a_request_past_its_deadline_ends(repository, watched):
    engine = open_engine(repository, watched)
    hold = threading.Event()
    watched.before_unet = lambda inputs: hold.wait(30)
    client = Client(engine, replace(request(engine, steps=4), deadline_ms=300))
    error = client.error
    hold.set()
    assert error.code == "DEADLINE_EXCEEDED"
    assert "deadline_ms=300" in str(error)
    engine.close()


def test_a_request_past_its_deadline_is_in_no_further_call(repository, watched):
    engine, began = open_engine(repository, watched), []
    watched.before_unet = lambda inputs: (began.append(time.monotonic()), time.sleep(0.02))
    client = Client(engine, replace(request(engine, steps=50), deadline_ms=100))
    assert client.error.code == "DEADLINE_EXCEEDED"
    assert began
    # One may have been chosen just before.
    assert sum(call > client.generation.deadline for call in began) <= 1
    engine.close()


def test_a_deadline_that_cannot_be_met_is_refused_at_once(repository):
    engine = open_engine(repository)
    assert Client(engine, request(engine, steps=4)).error is None  # which shows the pace
    engine._admission.pace = 10.0
    with pytest.raises(EngineError, match="deadline_ms is too short") as refused:
        Client(engine, replace(request(engine, steps=4), deadline_ms=1000))
    assert refused.value.code == "DEADLINE_EXCEEDED"
    engine.close()


def test_a_drain_finishes_what_lives_and_refuses_what_comes(repository, watched):
    engine = open_engine(repository, watched)
    entered, go_on = threading.Event(), threading.Event()
    watched.before_unet = lambda inputs: (entered.set(), go_on.wait(30))
    client = Client(engine, request(engine, steps=2))
    assert entered.wait(30)
    assert not engine.drain(0.05)
    with pytest.raises(EngineError, match="shutting down") as refused:
        Client(engine, request(engine))
    assert refused.value.code == "UNAVAILABLE"
    go_on.set()
    assert engine.drain(30)
    assert client.error is None
    engine.close()


def test_pictures_that_wait_for_an_encoder_hold_the_decoder_back(repository, watched, monkeypatch):
    monkeypatch.setattr("twinbrush.engine.decode.WAITING_NUMBERS", 1)
    go_on, encode = threading.Event(), engine_module.images.encode

    def slow(*args, **kwargs):
        assert go_on.wait(30)
        return encode(*args, **kwargs)

    monkeypatch.setattr("twinbrush.engine.images.encode", slow)
    engine = open_engine(repository, watched)
    decoded, run = [], watched.models.run
    watched.models.run = lambda model, inputs: (
        decoded.append(len(inputs["latent"])) if model == "vqgan_decoder" else None,
        run(model, inputs),
    )[1]
    clients = [
        Client(engine, request(engine, steps=1, seed=seed, deterministic=True, progress=False))
        for seed in range(6)
    ]
    time.sleep(1.0)
    assert sum(decoded) <= 2  # one waits for an encoder, one for its turn
    go_on.set()
    assert [client.error for client in clients] == [None] * 6
    engine.close()
