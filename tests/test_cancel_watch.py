"""How often live requests are asked whether their clients have left."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from twinbrush.triton.cancel_watch import CancelWatch

POLL_SECONDS = 0.0002  # of processor time, as a round trip to the server takes


class Live:
    """A request; `left` is whether its client has gone."""

    def __init__(self, name: str = "a", error: Exception | None = None):
        self.request_id, self.left, self.polls, self._error = name, False, 0, error

    def cancelled(self) -> bool:
        self.polls += 1
        if self._error is not None:
            raise self._error
        until = time.thread_time() + POLL_SECONDS
        while time.thread_time() < until:
            pass
        return self.left


@pytest.fixture
def watch() -> Iterator[CancelWatch]:
    died: list[str] = []
    watch = CancelWatch(died.append)
    yield watch
    watch.close()
    assert died == []


def test_a_client_that_leaves_is_noticed_between_two_calls_of_the_unet(watch):
    request, noticed = Live(), threading.Event()
    watch.add(request, noticed.set)
    time.sleep(0.5)
    assert not noticed.is_set()
    assert request.polls > 12
    request.left = True
    assert noticed.wait(5)


def test_many_requests_share_the_polls_and_none_that_has_ended_gets_one(watch):
    requests = [Live() for _ in range(300)]
    for request in requests:
        watch.add(request, lambda: None)
    time.sleep(1.2)
    rounds = max(request.polls for request in requests)
    assert 1 <= rounds <= 5
    for request in requests:
        watch.discard(request)
    time.sleep(0.2)  # a round may run
    before = [request.polls for request in requests]
    time.sleep(0.6)
    assert [request.polls for request in requests] == before


def test_a_poll_that_fails_is_logged_once_and_the_others_are_polled_on(watch, caplog):
    broken, sound = Live("broken", RuntimeError("gone")), Live("sound")
    watch.add(broken, lambda: None)
    watch.add(sound, lambda: None)
    until = time.monotonic() + 10
    while sound.polls < 5 and time.monotonic() < until:
        time.sleep(0.01)
    assert sound.polls >= 5
    assert broken.polls == 1
    assert [r.getMessage() for r in caplog.records] == [
        "polling for a cancel failed: request id=broken"
    ]


def test_a_round_has_bounded_polls_and_the_oldest_are_asked_most_often_yet_all_are_asked(watch):
    requests = [Live() for _ in range(100)]
    for request in requests:
        watch.add(request, lambda: None)
    until = time.monotonic() + 20
    while min(request.polls for request in requests) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    polls = [request.polls for request in requests]
    assert min(polls) >= 2
    assert min(polls[:16]) > 2 * max(polls[20:])
