"""The costs of UNet calls, and what they bring to short requests, on simulated devices."""

import heapq
import math
import random
from functools import partial

import pytest

from twinbrush.engine.batcher import CallKey, Claim, StepBatcher
from twinbrush.engine.costs import Costs

KEY, LARGER = CallKey("unet", 8, 8), CallKey("unet", 16, 16)
MOST = 32


def on_cpu(rows):
    """Seconds of a call; a row of SD1.5 at 256×256 in bf16 on two cores."""
    return 0.02 + 0.39 * rows


def on_gpu(rows):
    """Seconds of a call; a row of SD1.5 at 512×512 on an H200 at half of its peak."""
    return 0.002 + 0.0017 * rows


def learned(device, most=MOST):
    costs = Costs()
    for rows in (1, 2, 4, 8, 16, 32):
        costs.observe(KEY, min(rows, most), device(min(rows, most)))
    return costs


def test_an_estimate_follows_the_calls():
    costs = Costs()
    costs.observe(KEY, 4, 1.0)
    for _ in range(50):
        costs.observe(KEY, 4, 2.0)
    assert costs.seconds(KEY, 4) == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("device", [on_cpu, on_gpu])
def test_unseen_rows_lie_between_those_that_were_seen(device):
    costs = learned(device)
    for rows in range(1, MOST + 1):
        assert costs.seconds(KEY, rows) == pytest.approx(device(rows), rel=0.01)
    assert costs.seconds(KEY, 64) == pytest.approx(2 * device(32))


def test_a_size_without_calls_has_the_pace_of_the_others():
    costs = Costs()
    costs.observe(KEY, 4, 1.0)
    assert costs.seconds(LARGER, 2) == pytest.approx(1.0 / 4 * 2 * 4)


def test_where_larger_calls_gain_nothing_a_call_is_small():
    assert learned(on_cpu).enough_rows(KEY, MOST) <= 4


@pytest.mark.parametrize("most", [1, 2, 4])
def test_small_calls_are_never_made_smaller(most):
    costs = learned(on_cpu, most)
    for _ in range(200):
        assert costs.enough_rows(KEY, most) == most
        costs.observe(KEY, most, on_cpu(most))


def test_where_larger_calls_gain_a_call_is_as_large_as_it_may_be():
    assert learned(on_gpu).enough_rows(KEY, MOST) == MOST


def test_rows_never_exceed_what_a_call_may_have_and_all_classes_are_tried():
    costs, tried = learned(on_cpu), set()
    for _ in range(2000):
        rows = costs.enough_rows(KEY, 20)
        assert 1 <= rows <= 20
        tried.add(rows)
        costs.observe(KEY, rows, on_cpu(rows))
    assert {20, 10, 5, 2, 1} <= tried


def test_a_first_call_that_was_slow_is_forgotten():
    costs = Costs()
    costs.observe(KEY, 1, 100.0)  # as when kernels are compiled
    for _ in range(4000):
        rows = costs.enough_rows(KEY, MOST)
        costs.observe(KEY, rows, on_cpu(rows))
    assert costs.enough_rows(KEY, MOST) <= 4


def arrivals(device, load, count, seed):
    """(time, steps) of Poisson arrivals that keep a device with full calls busy for `load`."""
    draw = random.Random(seed)
    rate = load / (device(MOST) / MOST * (2 + 4 + 20) / 3)
    now, found = 0.0, []
    for _ in range(count):
        now += draw.expovariate(rate)
        found.append((now, draw.choice([2, 4, 20])))
    return found


def simulate(device, requests, learn):
    """Latencies by steps, and the time of the last answer, with or without `Costs`."""
    costs = Costs()
    rows_of = partial(costs.enough_rows, most=MOST) if learn else lambda key: MOST
    batcher = StepBatcher(rows_of, costs.seconds)
    waiting = list(requests)
    heapq.heapify(waiting)
    born, latency, now = {}, {2: [], 4: [], 20: []}, 0.0
    while waiting or len(batcher):
        if not len(batcher):
            now = max(now, waiting[0][0])
        while waiting and waiting[0][0] <= now:
            at, steps = heapq.heappop(waiting)
            batcher.add(claim := Claim(KEY, [1] * steps))
            born[claim] = at
        call = batcher.schedule(now)
        now += device(len(call))
        costs.observe(KEY, len(call), device(len(call)))
        batcher.advance(call)
        for claim in call:
            if not claim.left:
                latency[len(claim.rows)].append(now - born[claim])
    return latency, now


def p99(latencies):
    return sorted(latencies)[math.ceil(0.99 * len(latencies)) - 1]


def mean(latency):
    everyone = [seconds for group in latency.values() for seconds in group]
    return sum(everyone) / len(everyone)


@pytest.mark.parametrize("load", [0.7, 0.9])
def test_short_requests_wait_less_where_calls_gain_nothing_and_nobody_pays(load):
    requests = arrivals(on_cpu, load, 2000, seed=1)
    (plain, plain_end), (known, known_end) = (simulate(on_cpu, requests, k) for k in (False, True))
    assert p99(known[2]) <= 0.7 * p99(plain[2])
    assert mean(known) <= mean(plain)
    assert known_end <= 1.02 * plain_end


def test_where_calls_gain_nothing_changes():
    requests = arrivals(on_gpu, 0.8, 2000, seed=1)
    (plain, plain_end), (known, known_end) = (simulate(on_gpu, requests, k) for k in (False, True))
    assert p99(known[2]) <= 1.05 * p99(plain[2])
    assert mean(known) <= 1.05 * mean(plain)
    assert known_end <= 1.02 * plain_end


def test_a_crowd_of_sizes_pays_for_the_time_of_its_small_calls():
    """Sixteen images of one size keep their share of the time beside 40 of other sizes."""
    costs = Costs()
    batcher = StepBatcher(lambda key: MOST, costs.seconds)
    for key in [KEY] * 16 + [CallKey("unet", 8, 9 + n) for n in range(40)]:
        batcher.add(Claim(key, [1] * 10_000))
    spent = {True: 0.0, False: 0.0}
    for _ in range(2000):
        call = batcher.schedule()
        key, seconds = call[0].key, 0.010 + 0.001 * len(call)
        spent[key == KEY] += seconds
        costs.observe(key, len(call), seconds)
        batcher.advance(call)
    assert spent[True] / sum(spent.values()) == pytest.approx(16 / 56, rel=0.1)
