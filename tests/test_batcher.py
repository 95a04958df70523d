"""Properties of the step batcher, whatever arrives in whatever order."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinbrush.engine.batcher import Job, StepBatcher

MAX_ROWS = 8
jobs = st.builds(
    Job,
    group=st.sampled_from(["64x64", "96x64", "128x128"]),
    rows=st.integers(1, 2),
    steps=st.integers(1, 50),
    capacity=st.just(MAX_ROWS),
)
# What happens between two calls: jobs that arrive, and how many of the waiting are cancelled.
histories = st.lists(st.tuples(st.lists(jobs, max_size=6), st.integers(0, 2)), max_size=30)


def run(batcher, history=(), until=10_000):
    """Plays a history, then runs on to the end; gives every batch and the cancelled jobs."""
    batches, waiting, cancelled = [], [], []
    for tick in range(until):
        if tick < len(history):
            arriving, cancels = history[tick]
            for job in arriving:
                batcher.add(job)
                waiting.append(job)
            for job in waiting[:cancels]:
                batcher.remove(job)
                cancelled.append((job, len(batches)))
            del waiting[:cancels]
        batch = batcher.next_batch()
        if not batch and tick >= len(history):
            return batches, cancelled
        batches.append(batch)
        waiting = [job for job in waiting if job.step < job.steps]
    raise AssertionError("it never ended")


@given(histories)
def test_no_row_is_lost_or_run_twice(history):
    batches, cancelled = run(batcher := StepBatcher(), history)
    ran = Counter(id(job) for batch in batches for job in batch)
    stopped = {id(job) for job, _ in cancelled}
    for job in (job for arriving, _ in history for job in arriving):
        assert job.step == ran[id(job)]
        assert job.step == job.steps or id(job) in stopped
    assert len(batcher) == 0
    assert all(len(set(map(id, batch))) == len(batch) for batch in batches)


@given(histories)
def test_a_call_has_one_group_and_at_most_max_rows(history):
    for batch in run(StepBatcher(), history)[0]:
        assert sum(job.rows for job in batch) <= MAX_ROWS
        assert len({job.group for job in batch}) <= 1


@given(histories)
def test_a_cancelled_job_is_in_no_later_call(history):
    batches, cancelled = run(StepBatcher(), history)
    for job, at in cancelled:
        assert all(job not in batch for batch in batches[at:])


@given(st.lists(jobs, min_size=1, max_size=20))
def test_free_rows_are_used(arriving):
    """No job of the group that would still fit is left out of a call."""
    batcher = StepBatcher()
    for job in arriving:
        batcher.add(job)
    left = list(arriving)
    while batch := batcher.next_batch():
        free = MAX_ROWS - sum(job.rows for job in batch)
        out = [job for job in left if job.group == batch[0].group and job not in batch]
        assert all(job.rows > free for job in out)
        left = [job for job in left if job.step < job.steps]


@given(st.integers(1, 20), st.integers(1, 10))
def test_equal_jobs_finish_in_order_of_arrival(count, steps):
    batcher, finished = StepBatcher(), []
    for name in range(count):
        job = Job("g", 1, steps, capacity=4)
        job.name = name  # type: ignore[attr-defined]
        batcher.add(job)
    while batch := batcher.next_batch():
        finished += [job.name for job in batch if job.step == job.steps]  # type: ignore[attr-defined]
    assert finished == list(range(count))


def test_a_short_job_overtakes_long_ones():
    batcher = StepBatcher()
    for _ in range(8):
        batcher.add(Job("g", 1, 50, capacity=4))
    for _ in range(3):
        batcher.next_batch()
    short = Job("g", 1, 4, capacity=4)
    batcher.add(short)
    for _ in range(4):
        assert short in batcher.next_batch()


@given(st.integers(1, 40), st.integers(0, 300), st.integers(1, 10))
def test_a_short_job_is_not_held_back_by_long_ones_whenever_it_comes(crowd, calls_before, steps):
    """Every other call is its own, once those are done that had fewer steps left than it."""
    batcher = StepBatcher()
    for _ in range(crowd):
        batcher.add(Job("g", 2, 50, capacity=2))
    for _ in range(calls_before):
        batcher.next_batch()
    short = Job("g", 2, steps, capacity=2)
    batcher.add(short)
    for _ in range(3 * steps):
        batcher.next_batch()
    assert short.step == steps


@pytest.mark.parametrize(("steps", "arriving"), [(1, 1), (1, 3), (3, 1)])
def test_a_long_job_waits_only_for_those_that_came_while_it_could_have_run(steps, arriving):
    """Every other call goes by deadline, whatever comes when the long one is late."""
    batcher = StepBatcher()
    long = Job("g", 1, 50, capacity=1)
    batcher.add(long)
    for _ in range(2 * (50 + 50 * arriving * steps)):
        for _ in range(arriving):
            batcher.add(Job("g", 1, steps, capacity=1))
        batcher.next_batch()
    assert long.step == 50


def test_a_long_job_is_not_starved_by_an_endless_stream_of_short_ones():
    batcher = StepBatcher()
    long = Job("g", 1, 50, capacity=4)
    batcher.add(long)
    for _ in range(150):
        for _ in range(4):  # as many as a call holds, so the server is always full
            batcher.add(Job("g", 1, 1, capacity=4))
        batcher.next_batch()
    assert long.step == 50


@pytest.mark.parametrize("crowd", [1, 40])
def test_a_rare_size_takes_turns_with_the_crowd(crowd):
    batcher = StepBatcher()
    for _ in range(crowd):
        batcher.add(Job("common", 1, 50, capacity=4))
    rare = Job("rare", 1, 10, capacity=4)
    batcher.add(rare)
    for _ in range(20):
        batcher.next_batch()
    assert rare.step == 10


def test_a_cancelled_jobs_place_is_taken_in_the_next_call():
    batcher = StepBatcher()
    first, second, third = (Job("g", 1, 5, capacity=2) for _ in range(3))
    for job in (first, second, third):
        batcher.add(job)
    assert batcher.next_batch() == [first, second]
    batcher.remove(first)
    assert batcher.next_batch() == [second, third]


def test_a_job_that_can_never_run_is_refused():
    with pytest.raises(ValueError, match="rows=2"):
        StepBatcher().add(Job("g", 2, 5, capacity=1))
