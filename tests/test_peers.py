"""`benchmarks.peers`: its loads and its summary."""

from __future__ import annotations

import threading
import time

import pytest

from benchmarks.peers.__main__ import summarise
from benchmarks.peers.load import (
    closed_loop,
    describe,
    describe_mixed,
    mixed,
    open_loop,
    same,
    work,
)
from benchmarks.peers.peers import loop_repository

PNG = b"\x89PNG"


def test_a_closed_loop_keeps_its_clients_busy_and_no_more():
    live, most, lock = 0, 0, threading.Lock()

    def send(ask):
        nonlocal live, most
        with lock:
            live += 1
            most = max(most, live)
        time.sleep(0.02)
        with lock:
            live -= 1
        return PNG

    answers, seconds = closed_loop(send, 4, same(12, 4, 64))
    assert most == 4
    assert describe(answers, seconds)["images"] == 12


def test_what_is_no_picture_ends_the_benchmark():
    with pytest.raises(RuntimeError, match="no PNG"):
        closed_loop(lambda ask: b"error", 1, same(1, 4, 64))


def test_mixed_requests_hold_short_and_long_ones_of_new_prompts():
    asks, again = mixed(12, 256, 1), mixed(12, 256, 1)
    assert [(a.steps, a.side) for a in asks] == [(a.steps, a.side) for a in again]
    assert len({ask.prompt for ask in asks + again}) == 24
    assert {ask.steps for ask in asks} == {2, 4, 20}
    assert {ask.side for ask in asks} == {256, 320}
    assert work(same(3, 4, 256), 4, 256) == 1
    answers, seconds = open_loop(lambda ask: PNG, 1000.0, asks, 1)
    found = describe_mixed(answers, seconds)
    assert found["short"]["images"] + found["long"]["images"] == found["images"] == 12


def test_the_summary_names_the_best_peer_of_each_goal():
    def result(one: float, eight: float, p99: float) -> dict:
        rates = {
            f"c{n}": [{"images_per_second": r * pace} for pace in (0.5, 1, 2)]
            for n, r in ((1, one), (8, eight))
        }
        return rates | {"mixed": {"short": {"p99_s": p99}}}

    results = {"a": result(2, 2, 9), "b": result(1, 4, 8), "twinbrush": result(2, 6, 2)}
    summary = summarise(results)
    assert summary["c1"] == {"ratio": 1.0, "best_peer": "a"}
    assert summary["c8"] == {"ratio": 1.5, "best_peer": "b"}
    assert summary["short_p99"] == {"ratio": 4.0, "best_peer": "b"}
    for turn in (0, 1):  # two turns that are noisy for one side only
        results["twinbrush"]["c8"][turn]["images_per_second"] *= 2 if turn else 0.1
    assert summarise(results)["c8"]["ratio"] == 1.5
    assert summarise({"a": result(1, 1, 1)}) == {}


def test_the_looping_peer_serves_the_same_files(repository, tmp_path):
    made = loop_repository(repository, tmp_path, tmp_path / "made")
    assert (made / "unet" / "1" / "model.onnx").samefile(repository / "unet/1/model.onnx")
    assert (made / "loop" / "1" / "checkpoint.json").is_file()
    assert not (made / "text_to_image").exists()
