"""Properties of the step batcher, whatever arrives in whatever order."""

from collections import Counter, defaultdict
from itertools import chain, count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinbrush.engine.batcher import CallKey, Claim, StepBatcher

MAX_ROWS = 8
KEYS = [CallKey("unet", 8, 8), CallKey("unet", 12, 8), CallKey("unet", 16, 16)]
ALONE = CallKey("unet", 8, 8, alone=True)
HIGH, NORMAL, LOW = 4.0, 1.0, 0.25


def claim(steps, rows=1, key=KEYS[0], **fields):
    return Claim(key, [rows] * steps, **fields)


def batcher_of(rows, **fields):
    return StepBatcher(lambda key: rows, **fields)


def run_call(batcher, **fields):
    batch = batcher.schedule(**fields)
    batcher.advance(batch)
    return batch


def work(batch):
    """Rows × cells, before the call is counted."""
    return sum(c.next_rows * c.key.height * c.key.width for c in batch)


def build_claim(key, rows, priority):
    return Claim(key, rows, priority)


claims = st.builds(
    build_claim,
    st.sampled_from([*KEYS, ALONE]),
    st.lists(st.integers(1, 2), min_size=1, max_size=50),
    st.sampled_from([HIGH, NORMAL, LOW]),
)
equal_claims = st.builds(
    build_claim,
    st.sampled_from(KEYS),
    st.lists(st.integers(1, 2), min_size=1, max_size=50),
    st.just(1),
)
# What happens between two calls: claims that arrive, and how many of the waiting are cancelled.
histories = st.lists(st.tuples(st.lists(claims, max_size=6), st.integers(0, 2)), max_size=30)


def run(batcher, history=(), until=20_000):
    """Plays a history, then runs on to the end; returns every batch and the cancelled claims."""
    batches, waiting, cancelled = [], [], []
    for tick in range(until):
        if tick < len(history):
            arriving, cancels = history[tick]
            for c in arriving:
                batcher.add(c)
                waiting.append(c)
            for c in waiting[:cancels]:
                batcher.remove(c)
                cancelled.append((c, len(batches)))
            del waiting[:cancels]
        batch = batcher.schedule()
        if not batch and tick >= len(history):
            return batches, cancelled
        assert sum(c.next_rows for c in batch) <= MAX_ROWS
        batcher.advance(batch)
        batches.append(batch)
        waiting = [c for c in waiting if c.left]
    raise AssertionError("it never ended")


@given(histories)
def test_no_row_is_lost_or_run_twice(history):
    batches, cancelled = run(batcher := batcher_of(MAX_ROWS), history)
    ran = Counter(id(c) for batch in batches for c in batch)
    stopped = {id(c) for c, _ in cancelled}
    for c in (c for arriving, _ in history for c in arriving):
        assert c.done == ran[id(c)]
        assert c.done == len(c.rows) or id(c) in stopped
    assert len(batcher) == 0
    assert all(len(set(map(id, batch))) == len(batch) for batch in batches)


@given(histories)
def test_a_call_has_one_key_and_at_most_its_capacity(history):
    for batch in run(batcher_of(MAX_ROWS), history)[0]:  # `run` checks the rows of every call
        assert len({c.key for c in batch}) <= 1
        assert len(batch) <= 1 or not batch[0].key.alone


@given(histories)
def test_a_cancelled_claim_is_in_no_later_call(history):
    batches, cancelled = run(batcher_of(MAX_ROWS), history)
    for c, at in cancelled:
        assert all(c not in batch for batch in batches[at:])


@given(histories)
def test_a_call_runs_whenever_a_claim_waits(history):
    batcher = batcher_of(MAX_ROWS)
    for arriving, cancels in history:
        for c in arriving:
            batcher.add(c)
        for c in arriving[:cancels]:
            batcher.remove(c)
        live = len(batcher)
        assert bool(run_call(batcher)) == bool(live)
    while len(batcher):
        assert run_call(batcher)


@given(st.lists(equal_claims, min_size=1, max_size=20))
def test_free_rows_are_used(arriving):
    """No claim of the key that would still fit is left out of a call."""
    batcher = batcher_of(MAX_ROWS)
    for c in arriving:
        batcher.add(c)
    left = list(arriving)
    while batch := batcher.schedule():
        free = MAX_ROWS - sum(c.next_rows for c in batch)
        out = [c for c in left if c.key == batch[0].key and c not in batch]
        assert all(c.next_rows > free for c in out)
        batcher.advance(batch)
        left = [c for c in left if c.left]


def test_other_priorities_ride_along_in_free_rows():
    batcher = batcher_of(MAX_ROWS)
    mixed = [claim(20, priority=p) for p in (HIGH, NORMAL, LOW)]
    for c in mixed:
        batcher.add(c)
    for _ in range(20):
        assert set(run_call(batcher)) == set(mixed)


@given(st.integers(1, 20), st.integers(1, 10))
def test_equal_claims_finish_in_order_of_arrival(count, steps):
    batcher, finished = batcher_of(4), []
    order = [claim(steps) for _ in range(count)]
    for c in order:
        batcher.add(c)
    while batch := run_call(batcher):
        finished += [c for c in batch if not c.left]
    assert finished == order


# Inside a lane ---------------------------------------------------------------------------------


def test_a_short_claim_overtakes_long_ones():
    batcher = batcher_of(4)
    for _ in range(8):
        batcher.add(claim(50))
    for _ in range(3):
        run_call(batcher)
    short = claim(4)
    batcher.add(short)
    for _ in range(4):
        assert short in run_call(batcher)


@given(st.integers(1, 40), st.integers(0, 300), st.integers(1, 10))
def test_a_short_claim_is_not_held_back_by_long_ones_whenever_it_comes(crowd, calls_before, steps):
    """Every other call is its own, once those are done that had fewer calls left than it."""
    batcher = batcher_of(2)
    for _ in range(crowd):
        batcher.add(claim(50, rows=2))
    for _ in range(calls_before):
        run_call(batcher)
    short = claim(steps, rows=2)
    batcher.add(short)
    for _ in range(3 * steps):
        run_call(batcher)
    assert short.done == steps


@pytest.mark.parametrize(("steps", "arriving"), [(1, 1), (1, 3), (3, 1)])
def test_a_long_claim_waits_only_for_those_that_came_while_it_could_have_run(steps, arriving):
    """Every other call goes by virtual deadline, whatever comes when the long one is late."""
    batcher = batcher_of(1)
    long = claim(50)
    batcher.add(long)
    for _ in range(2 * (50 + 50 * arriving * steps)):
        for _ in range(arriving):
            batcher.add(claim(steps))
        run_call(batcher)
    assert long.done == 50


def test_a_long_claim_is_not_starved_by_an_endless_stream_of_short_ones():
    batcher = batcher_of(4)
    long = claim(50)
    batcher.add(long)
    for _ in range(150):
        for _ in range(4):  # as many as a call holds, so the server is always full
            batcher.add(claim(1))
        run_call(batcher)
    assert long.done == 50


# Over all lanes --------------------------------------------------------------------------------


@pytest.mark.parametrize("crowd", [1, 40])
def test_a_rare_size_has_the_share_of_an_image_of_the_crowd(crowd):
    batcher = batcher_of(4)
    for _ in range(crowd):
        batcher.add(claim(50, key=KEYS[0]))
    rare = claim(10, key=CallKey("unet", 8, 8 + 1))
    batcher.add(rare)
    a_round = -(-crowd // 4) + 1  # calls in which each image of the crowd has had one
    for _ in range(10 * (a_round + 1)):  # its size is an eighth more work
        run_call(batcher)
    assert rare.done == 10


def play_closed(batcher, clients, calls):
    """Each client sends its next image when the last is done; returns the work of each.

    Args:
        clients: functions that make a claim.
    """
    owner = {}
    for client in clients:
        batcher.add(c := client())
        owner[c] = client
    done = Counter()
    for _ in range(calls):
        batch = batcher.schedule()
        for c in batch:
            done[owner[c]] += work([c])
        batcher.advance(batch)
        for c in batch:
            if not c.left:
                client = owner.pop(c)
                batcher.add(new := client())
                owner[new] = client
    return done


def client_of(*args, **fields):
    return lambda: claim(*args, **fields)


def odd_sizes(crowd, steps=1, **fields):
    """A crowd in which no two share a size."""
    return [
        client_of(steps, rows=2, key=CallKey("unet", 6 + n % 5, 6 + n), **fields)
        for n in range(crowd)
    ]


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("popular", [4, 16, 64])
def test_a_crowd_of_sizes_leaves_the_popular_one_its_share(popular, steps):
    """The share of the work is that of the live images; at least half of it is promised."""
    users = [client_of(4, rows=2) for _ in range(popular)]
    crowd = odd_sizes(40, steps)
    done = play_closed(batcher_of(32), users + crowd, 4000)
    share = sum(done[user] for user in users) / done.total()
    assert share >= 0.9 * popular / (popular + 40)
    assert min(done[user] for user in crowd) > 0


def test_equal_images_have_equal_shares_of_the_work_whatever_their_size():
    users = [client_of(7, rows=2, key=key) for key in KEYS for _ in range(3)]
    done = play_closed(batcher_of(4), users, 3000)
    mean = done.total() / len(users)
    assert all(0.9 * mean <= done[user] <= 1.1 * mean for user in users)


@pytest.mark.parametrize("keys", [KEYS[:1] * 3, KEYS])
def test_priorities_share_the_work_by_weight_and_none_starves(keys):
    priorities = (HIGH, NORMAL, LOW)
    users = {
        p: [client_of(5, key=k, priority=p) for _ in range(8)]
        for p, k in zip(priorities, keys, strict=True)
    }
    done = play_closed(batcher_of(4), [*chain(*users.values())], 6000)
    share = {p: sum(done[user] for user in users[p]) for p in priorities}
    assert share[HIGH] / share[NORMAL] == pytest.approx(4, rel=0.05)
    assert share[NORMAL] / share[LOW] == pytest.approx(4, rel=0.05)
    assert min(done.values()) > 0


@pytest.mark.parametrize("steps", [1, 20])
def test_riders_take_no_more_than_their_share_from_other_sizes(steps):
    """Low claims that ride in the calls of a high one are charged, also when they come anew."""
    high, low = client_of(20, priority=HIGH), [client_of(steps, priority=LOW) for _ in range(7)]
    others = [client_of(20, key=KEYS[1]) for _ in range(8)]
    done = play_closed(batcher_of(8), [high, *low, *others], 4000)
    share = sum(done[user] for user in low) / done.total()
    assert share == pytest.approx(7 * LOW / (HIGH + 7 * LOW + 8 * NORMAL), rel=0.2)


def test_rides_while_nobody_waits_are_not_held_against_the_rider():
    batcher = batcher_of(8)
    batcher.add(high := claim(1000, priority=HIGH))
    batcher.add(low := claim(1000, priority=LOW))
    for _ in range(500):
        run_call(batcher)
    batcher.remove(high)
    for _ in range(8):
        batcher.add(claim(1000, key=KEYS[1]))
    for _ in range(50):
        run_call(batcher)
    assert low.done > 500


def test_newcomers_of_ever_new_sizes_never_hold_back_who_waits():
    batcher = batcher_of(4)
    waiting = claim(10, rows=2, key=CallKey("unet", 64, 64))
    batcher.add(waiting)
    for n, _ in zip(count(8), range(2000)):
        batcher.add(claim(1, key=CallKey("unet", 8, n), priority=HIGH))
        run_call(batcher)
    assert waiting.done == 10


class Waits:
    """Holds the bound of the module's docstring against every wait of every lane."""

    def __init__(self, batcher):
        self.batcher, self.live = batcher, []
        self.waits = {}  # lane -> [work of others, longest call of each lane, most W, most l/w]

    def lanes(self):
        lanes = defaultdict(list)
        for c in self.live:
            lanes[c.key, c.priority].append(c)
        return lanes

    def observe(self, batch):
        lanes = self.lanes()
        weight = {lane: lane[1] * len(members) for lane, members in lanes.items()}
        served = {(c.key, c.priority) for c in batch}
        for lane, members in lanes.items():
            wait = self.waits.setdefault(lane, [0.0, {}, {}, 0.0])
            wait[3] = max(wait[3], min(work(members), MAX_ROWS * area(lane)) / weight[lane])
            for other in lanes:
                wait[2][other] = max(wait[2].get(other, 0.0), weight[other])
                call = min(work(lanes[other]), MAX_ROWS * area(other))
                wait[1][other] = max(wait[1].get(other, 0.0), call)
            if lane not in served:
                wait[0] += work(batch)
        return served

    def check(self, served):
        for lane, (others, calls, weights, call) in self.waits.items():
            calls = sum(calls.values()) - calls.get(lane, 0.0)
            assert others <= 2 * call * sum(weights.values()) + 2 * calls
        here = self.lanes()
        self.waits = {k: v for k, v in self.waits.items() if k in here and k not in served}


def area(lane):
    return lane[0].height * lane[0].width


@given(histories)
def test_no_lane_waits_longer_than_the_stated_bound(history):
    batcher = batcher_of(MAX_ROWS)
    waits = Waits(batcher)
    for tick in range(20_000):
        if tick < len(history):
            arriving, cancels = history[tick]
            for c in arriving:
                batcher.add(c)
            waits.live += arriving
            for c in waits.live[:cancels]:
                batcher.remove(c)
            del waits.live[:cancels]
        elif not len(batcher):
            return
        batch = batcher.schedule()
        served = waits.observe(batch)
        batcher.advance(batch)
        waits.live = [c for c in waits.live if c.left]
        waits.check(served)
    raise AssertionError("it never ended")


# Calls in flight -------------------------------------------------------------------------------

events = st.lists(
    st.one_of(
        claims,
        st.sampled_from(["schedule", "ahead", "advance", "part", "release"]),
        st.tuples(st.just("remove"), st.integers(0, 50)),
    ),
    max_size=80,
)


@given(events)
def test_a_claim_is_never_in_two_calls_whatever_ends_how(history):
    batcher, calls, live, done = batcher_of(MAX_ROWS), [], [], Counter()
    for event in history:
        if isinstance(event, Claim):
            batcher.add(event)
            live.append(event)
        elif event in ("schedule", "ahead"):
            batch = batcher.schedule(ahead=event == "ahead")
            assert not {c for call in calls for c in call} & set(batch)
            assert set(batch) <= set(live)
            if batch:
                calls.append(batch)
        elif event[0] == "remove":
            if live:
                batcher.remove(gone := live.pop(event[1] % len(live)))
                batcher.remove(gone)
        elif calls:
            call = calls.pop(0)
            good = {"advance": len(call), "part": len(call) // 2, "release": 0}[event]
            batcher.advance(call[:good])
            batcher.release(call[good:])
            done.update(c for c in call[:good] if c in live)
            live = [c for c in live if c.left]
        running = {c for call in calls for c in call} & set(live)
        assert len(batcher) == len(live)
        assert batcher.waiting == len(live) - len(running)
        assert all(c.done == done[c] for c in live)
    for call in calls:
        batcher.advance(call)
    run(batcher)
    assert not len(batcher)
    assert not [c for c in live if c.left]


def test_two_calls_can_be_in_flight():
    batcher = batcher_of(4)
    crowd = [claim(3) for _ in range(8)]
    for c in crowd:
        batcher.add(c)
    first, second = batcher.schedule(), batcher.schedule(ahead=True)
    assert sorted(map(id, first + second)) == sorted(map(id, crowd))
    assert batcher.schedule() == []
    batcher.advance(second)
    assert set(batcher.schedule()) == set(second)
    assert all(c.done == 0 for c in first)


def test_a_rest_of_a_lane_waits_for_its_running_claims_to_share_a_call():
    batcher = batcher_of(8)
    early = [claim(3) for _ in range(4)]
    for c in early:
        batcher.add(c)
    call = batcher.schedule()
    late = claim(3)
    batcher.add(late)
    assert batcher.schedule(ahead=True) == []
    batcher.advance(call)
    assert set(batcher.schedule()) == {*early, late}


def test_a_call_prepared_ahead_does_not_take_the_turn_of_a_running_lane():
    """One large image beside a popular size: calls by turns would give it nearly all work."""
    batcher = batcher_of(32)
    for _ in range(16):
        batcher.add(claim(100, rows=2))
    large = claim(100, rows=2, key=CallKey("unet", 128, 128))
    batcher.add(large)
    calls = 0
    while not large.done:
        call = batcher.schedule()
        if large not in call:
            assert large not in batcher.schedule(ahead=True) or calls > 200
        batcher.advance(call)
        calls += 1


def test_a_released_claim_can_run_again_and_nothing_is_counted():
    batcher = batcher_of(4)
    batcher.add(failed := claim(2))
    batcher.release(batcher.schedule())
    assert failed.done == 0
    assert run_call(batcher) == [failed]
    assert failed.done == 1


def test_a_call_cannot_be_counted_twice():
    batcher = batcher_of(4)
    batcher.add(claim(2))
    call = batcher.schedule()
    batcher.advance(call)
    with pytest.raises(ValueError, match="no running call"):
        batcher.advance(call)


def test_a_cancelled_claims_place_is_taken_in_the_next_call():
    batcher = batcher_of(2)
    first, second, third = (claim(5) for _ in range(3))
    for c in (first, second, third):
        batcher.add(c)
    assert run_call(batcher) == [first, second]
    batcher.remove(first)
    assert run_call(batcher) == [second, third]


# Capacity --------------------------------------------------------------------------------------


@given(st.lists(claims, min_size=1, max_size=20), st.lists(st.integers(1, MAX_ROWS), min_size=1))
def test_capacity_may_shrink_while_claims_wait(arriving, capacities):
    rows = MAX_ROWS
    batcher = StepBatcher(lambda key: rows)
    for c in arriving:
        batcher.add(c)
    for tick in count():
        rows = capacities[min(tick, len(capacities) - 1)]
        batch = batcher.schedule()
        assert sum(c.next_rows for c in batch) <= rows or len(batch) == 1
        batcher.advance(batch)
        if not batch:
            break
    assert not any(c.left for c in arriving)


def test_a_claim_with_more_rows_than_a_call_may_have_runs_alone():
    batcher = batcher_of(1)
    wide = [claim(2, rows=2), claim(2, rows=2)]
    for c in (*wide, claim(2)):
        batcher.add(c)
    while batch := run_call(batcher):
        assert len(batch) == 1
    assert all(c.done == 2 for c in wide)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Claim(KEYS[0], []), "rows="),
        (Claim(KEYS[0], [2, 0]), "rows="),
        (Claim(KEYS[0], [1], priority=0.0), "priority=0"),
        (Claim(KEYS[0], [1], priority=float("nan")), "priority=nan"),
    ],
)
def test_a_claim_that_could_never_run_is_rejected(bad, message):
    batcher = batcher_of(2)
    with pytest.raises(ValueError, match=message):
        batcher.add(bad)
    assert not len(batcher)


def test_a_claim_is_added_once():
    batcher = batcher_of(2)
    batcher.add(twice := claim(2))
    with pytest.raises(ValueError, match="already"):
        batcher.add(twice)
    assert len(batcher) == 1


# Deadlines -------------------------------------------------------------------------------------


def seconds(key, rows):
    return 0.01 * rows * key.height * key.width / 64


def play_deadlines(batcher, now=0.0, until=1000.0):
    """Runs to the end on a simulated clock; returns when each claim ended."""
    ended = {}
    while now < until and (batch := batcher.schedule(now)):
        now += seconds(batch[0].key, sum(c.next_rows for c in batch))
        batcher.advance(batch)
        ended.update({c: now for c in batch if not c.left})
    return ended


def test_a_deadline_at_risk_is_met_before_the_share_would_allow_it():
    def trial(deadline):
        batcher = batcher_of(4, seconds=seconds)
        for _ in range(40):
            batcher.add(claim(50))
        batcher.add(dated := claim(10, key=KEYS[1], deadline=deadline))
        return play_deadlines(batcher)[dated]

    assert trial(None) > 0.6
    assert trial(0.6) <= 0.6


def test_a_deadline_that_cannot_be_met_jumps_nobody():
    batcher = batcher_of(1, seconds=seconds)
    batcher.add(first := claim(1, rows=1))
    batcher.add(claim(50, key=KEYS[1], deadline=0.01))
    assert batcher.schedule(0.0) == [first]


def test_a_deadline_far_away_changes_no_order():
    def trial(deadline):
        batcher = batcher_of(4, seconds=seconds)
        order = [claim(5, rows=2, key=key, deadline=deadline) for key in KEYS for _ in range(4)]
        for c in order:
            batcher.add(c)
        batches = []
        while batch := batcher.schedule(0.0):
            batcher.advance(batch)
            batches.append([order.index(c) for c in batch])
        return batches

    assert trial(None) == trial(1e6)


@given(st.integers(1, 12), st.integers(1, 20))
def test_deadlines_take_at_most_half_of_the_work(dated, slack):
    """Clients whose every image is at risk, beside one that has no deadline."""
    batcher = batcher_of(1, seconds=seconds)
    plain = [claim(400, key=KEYS[0]) for _ in range(dated)]
    for c in plain:
        batcher.add(c)
    now, work_of = 0.0, Counter()
    urgent = [claim(4, key=KEYS[1], deadline=0.0) for _ in range(dated)]
    for c in urgent:
        batcher.remove(c)
    live = []
    for _ in range(200):
        live = [c for c in live if c.left]
        while len(live) < dated:
            live.append(claim(4, key=KEYS[1], deadline=now + 0.06 * (1 + slack / 10)))
            batcher.add(live[-1])
        batch = batcher.schedule(now)
        spent = seconds(batch[0].key, sum(c.next_rows for c in batch))
        work_of[batch[0].key] += spent
        now += spent
        batcher.advance(batch)
    # Half of the work may jump; of the other half each lane has its share.
    assert work_of[KEYS[0]] >= 0.25 * work_of.total() - 0.1


def test_newcomers_join_a_call_that_has_not_begun_as_far_as_it_has_room():
    batcher = batcher_of(4)
    first, pair, single, other = claim(2), claim(3, rows=2), claim(1), claim(1, key=KEYS[1])
    batcher.add(first)
    call = batcher.schedule()
    for newcomer in (pair, other, claim(9, rows=2), single):
        batcher.add(newcomer)
    lane = batcher._places[first].lane
    tag = lane.start
    joined = batcher.join(call)
    assert set(joined) == {pair, single}
    assert lane.start == tag + 3 * first.key.cells / lane.weight  # their lane pays for them
    assert batcher.join([*call, *joined]) == []
    batcher.advance([*call, *joined])
    assert (first.left, pair.left, single.left) == (1, 2, 0)
    assert batcher.waiting == len(batcher) == 4


def test_nobody_joins_a_claim_that_is_alone_or_gone():
    batcher = batcher_of(4)
    for key in (ALONE, KEYS[0]):
        batcher.add(claim(2, key=key))
        call = batcher.schedule()
        batcher.add(claim(2, key=key))
        if key != ALONE:
            batcher.remove(call[0])
        assert batcher.join(call) == []
        for left in call:
            batcher.remove(left)
