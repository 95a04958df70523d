"""Newcomers share encoder calls where that saves time, and never wait for nothing."""

from __future__ import annotations

import queue
import threading
import time

import pytest

from twinbrush.engine.newcomers import WORTH, Gathering, gathered


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
