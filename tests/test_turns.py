"""Turns on one device: their order, and that nobody is passed over for ever."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest
from harness import open_engine
from test_engine import Client, request

from twinbrush.engine.turns import MOST_PASSED, Stage, Turns
from twinbrush.runtimes.onnx_runtime import LocalModels

STAGES = {"unet": Stage.DENOISE, "vqgan_decoder": Stage.DECODE}
FAULT = RuntimeError("a call failed")


def order_of(stages: list[Stage]) -> list[Stage]:
    """How turns are given to stages that all wait, in the order given, while another has one."""
    turns, had, threads = Turns(), [], []

    def wait(stage: Stage) -> None:
        with turns.take(stage):
            had.append(stage)

    with turns.take(Stage.DENOISE):
        for count, stage in enumerate(stages, 1):
            threads.append(threading.Thread(target=wait, args=[stage]))
            threads[-1].start()
            while len(turns._waiting) < count:
                time.sleep(0.001)
    for thread in threads:
        thread.join(10)
    return had


def test_decoding_goes_before_denoising_before_encoding():
    assert order_of([Stage.ENCODE, Stage.DENOISE, Stage.DECODE]) == sorted(Stage)


def test_nobody_is_passed_over_more_than_a_few_times():
    had = order_of([Stage.ENCODE, *[Stage.DECODE] * (3 * MOST_PASSED), Stage.DENOISE])
    assert had.index(Stage.ENCODE) == MOST_PASSED
    late = order_of([Stage.ENCODE] * 3 + [Stage.DENOISE] * (2 * MOST_PASSED))
    assert late[MOST_PASSED : MOST_PASSED + 3] == [Stage.ENCODE] * 3


def test_a_turn_that_fails_is_passed_on():
    turns = Turns()
    with pytest.raises(RuntimeError), turns.take(Stage.DECODE):
        raise FAULT
    with turns.take(Stage.ENCODE):
        pass


class Alone:
    """`Models` that note the stages which run at the same time."""

    def __init__(self, models):
        self.models, self.running, self.lock = models, Counter(), threading.Lock()
        self.together: set[frozenset[Stage]] = set()

    def run(self, model, inputs):
        stage = STAGES.get(model, Stage.ENCODE)
        with self.lock:
            self.running[stage] += 1
            self.together.add(frozenset(self.running))
        try:
            time.sleep(0.005)
            return self.models.run(model, inputs)
        finally:
            with self.lock:
                self.running -= Counter([stage])


def test_stages_never_share_the_device(repository):
    models = Alone(LocalModels(repository))
    engine = open_engine(repository, models, one_call_at_a_time=True)
    clients = [
        Client(engine, request(engine, f"number {n}", seed=n, steps=1 + n % 3)) for n in range(12)
    ]
    assert all(len(client.images) == 1 for client in clients)
    engine.close()
    assert models.together == {frozenset([stage]) for stage in Stage}


class Slow:
    """`Models` whose decoder can be held, and that note the rows of each UNet call."""

    def __init__(self, models):
        self.models, self.rows = models, []
        self.held, self.go_on = threading.Event(), threading.Event()

    def run(self, model, inputs):
        if model == "unet":
            self.rows.append(len(inputs["sample"]))
        if model == "vqgan_decoder" and not self.held.is_set():
            self.held.set()
            assert self.go_on.wait(60)
        return self.models.run(model, inputs)


def test_who_is_cancelled_while_a_call_waits_for_its_turn_leaves_it(repository):
    models = Slow(LocalModels(repository))
    engine = open_engine(repository, models, one_call_at_a_time=True)

    def send(**fields) -> Client:
        return Client(engine, request(engine, "a ring", guidance_scale=1.0, **fields))

    long = [send(seed=n, steps=9) for n in range(2)]
    short = send(seed=9, steps=1)  # whose picture is decoded while the others wait
    assert models.held.wait(60)
    until = time.monotonic() + 60
    while not engine._turns._waiting:  # type: ignore[union-attr]
        assert time.monotonic() < until
        time.sleep(0.001)
    before = len(models.rows)
    long[0].generation.cancel()
    models.go_on.set()
    assert long[0].error is not None
    assert [client.error for client in (long[1], short)] == [None, None]
    assert set(models.rows[before:]) == {1}
    engine.close()
