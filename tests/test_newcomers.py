"""Newcomers share encoder calls where that saves time, and never wait for nothing."""

from __future__ import annotations

import queue
import threading
import time

import pytest
from harness import open_engine
from test_engine import Client, request

from twinbrush.engine.limits import Limits
from twinbrush.engine.newcomers import WORTH, Gathering, gathered
from twinbrush.runtimes.onnx_runtime import LocalModels


def learned(*calls: tuple[int, float]) -> Gathering:
    gathering = Gathering()
    for texts, seconds in calls:
        gathering.observe(texts, seconds)
    return gathering


@pytest.mark.parametrize(
    ("calls", "saved"),
    [
        ((), 0),
        (((1, 0.007),), 0),  # what further texts cost is not known
        (((1, 0.007), (8, 0.007)), 0.007),
        (((1, 0.007), (8, 0.9), (8, 0.0084)), 0.0068),  # one was disturbed
        (((1, 0.1), (4, 0.4)), 0),
        (((1, 0.1), (4, 0.5)), 0),
        (((2, 0.03), (4, 0.05)), 0.01),
    ],
)
def test_what_joining_calls_saves_is_learned_from_calls_of_two_sizes(calls, saved):
    assert learned(*calls).saved == pytest.approx(saved)


def test_newcomers_wait_together_as_long_as_their_call_costs_the_others():
    gathering = learned((1, 0.01), (4, 0.01))
    assert gathering.patience([0.0], others=11) == pytest.approx(WORTH * 0.1)
    assert gathering.patience([0.05, 0.05], others=11) == pytest.approx((WORTH * 0.1 - 0.1) / 2)
    assert gathering.patience([WORTH * 0.1, 0.001], others=11) < 0
    assert gathering.patience([0.0], others=1) <= 0
    assert learned((1, 0.1), (4, 0.4)).patience([0.001], others=100) < 0


def test_a_batch_grows_until_patience_is_over_and_none_ends_it():
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for item in (1, 2):
        waiting.put(item)
    ends = time.monotonic() + 0.2
    late = threading.Timer(0.05, waiting.put, [3])
    late.start()
    batches = gathered(waiting, lambda batch: ends - time.monotonic())
    assert next(batches) == [1, 2, 3]
    for item in (4, None):
        waiting.put(item)
    assert list(batches) == [[4]]


class Held:
    """`Models` that hold UNet calls, and note the texts of each encoder call."""

    def __init__(self, repository):
        self.models = LocalModels(repository)
        self.texts: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.denoising, self.go_on = threading.Event(), threading.Event()

    def run(self, model, inputs):
        if model == "unet":
            self.denoising.set()
            assert self.go_on.wait(60)
        outputs = self.models.run(model, inputs)
        if model == "fusion":
            self.texts.put(len(inputs["clip_tokens"]))
        return outputs


def test_newcomers_share_an_encoder_call_while_others_are_made_unless_theirs_is_not_shared(
    repository, monkeypatch
):
    models = Held(repository)
    engine = open_engine(repository, models, limits=Limits(max_rows=4))
    monkeypatch.setattr(Gathering, "saved", 20.0)  # so only full or unshared calls are due

    def send(prompt: str, **fields) -> Client:
        return Client(engine, request(engine, prompt, guidance_scale=1.0, steps=2, **fields))

    clients = [send("a first circle")]
    assert models.denoising.wait(60)
    clients.append(send("a second circle"))  # beside a single one
    assert [models.texts.get(timeout=60) for _ in range(2)] == [1, 1]
    for group, texts in (
        ([{"prompt": f"circle {k}"} for k in range(4)], [4]),
        ([{"prompt": "a star"}, {"prompt": "a first circle"}], [1]),  # which is in the cache
        ([{"prompt": "a ring"}, {"prompt": "a cross", "deterministic": True}], [1, 1]),
    ):
        for fields in group[:-1]:
            clients.append(send(**fields))
        with pytest.raises(queue.Empty):
            models.texts.get(timeout=0.05)
        clients.append(send(**group[-1]))
        assert [models.texts.get(timeout=10) for _ in texts] == texts
    models.go_on.set()
    assert [client.error for client in clients] == [None] * len(clients)
    engine.close()
