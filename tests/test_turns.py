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

    STAGES = {"unet": Stage.DENOISE, "vqgan_decoder": Stage.DECODE}

    def __init__(self, models):
        self.models, self.running, self.lock = models, Counter(), threading.Lock()
        self.together: set[frozenset[Stage]] = set()

    def run(self, model, inputs):
        stage = self.STAGES.get(model, Stage.ENCODE)
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
    engine = open_engine(repository, models)
    clients = [
        Client(engine, request(engine, f"number {n}", seed=n, steps=1 + n % 3)) for n in range(12)
    ]
    assert all(len(client.images) == 1 for client in clients)
    engine.close()
    assert models.together == {frozenset([stage]) for stage in Stage}
