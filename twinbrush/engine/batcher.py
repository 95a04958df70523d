"""Chooses the images that take part in the next UNet call.

Claims of equal key and priority form a lane. Lanes share the work by weight, as in self-clocked
fair queueing (Golestani, INFOCOM 1994). Work is rows × latent cells, or seconds where the caller
can estimate them. A lane weighs the sum of its claims' priorities. Its tag advances by the work
of each call over its weight, and the lane whose next call would end at the earliest tag is
served. A lane that enters starts at the tag of the call served last, so newcomers never hold
back the lanes that wait.

Bound: between two of its calls a lane of weight w, whose call has the work l, waits at most for
2·l·W/w units of work and two calls of each other lane, where W is the weight of all lanes.

Inside a lane the calls alternate. One goes to the claims with the fewest calls left, so a short
image takes at most twice as long as it would without longer ones. The next goes to the earliest
virtual deadlines: the lane's call at which a claim would be done if it were alone. So a crowd of
short claims never starves a long one. Both orders serve equal claims as they arrived.

A claim whose deadline is at risk goes first while it can still be met. Such jumps take at most
half of the work, so they at most double the bound.

The batcher knows no arrays, no clock and no threads: callers pass the time and hold a lock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from twinbrush.engine.claims import CallKey, Claim, Lane


@dataclass(eq=False)
class _Place:
    """Where a live claim stands."""

    lane: Lane
    due: int  # virtual deadline: a count of the lane's calls
    arrival: int
    running: bool = False


class StepBatcher:
    """Chooses the claims of one call at a time.

    Args:
        capacity: rows that a call of a key may have. It may shrink at any time; a claim with
            more rows than that runs in a call of its own.
        seconds: estimated seconds of a call by key and rows. With it, work is measured in
            seconds and deadlines are respected; without it, work is rows × latent cells and
            deadlines have no effect.
    """

    def __init__(
        self,
        capacity: Callable[[CallKey], int],
        seconds: Callable[[CallKey, int], float] | None = None,
    ) -> None:
        self._capacity, self._seconds = capacity, seconds
        self._lanes: dict[CallKey, dict[float, Lane]] = {}
        self._places: dict[Claim, _Place] = {}
        self._dated: dict[Claim, float] = {}  # live claims with a deadline
        self._now = 0.0  # the tag of the call served last
        self._jumped = 0.0  # work of jumps less that of calls in turn; none may jump above 0
        self._arrivals = 0
        self._running = 0

    def __len__(self) -> int:
        """Live claims, waiting or running."""
        return len(self._places)

    @property
    def waiting(self) -> int:
        """Live claims that are in no running call."""
        return len(self._places) - self._running

    @property
    def waiting_rows(self) -> int:
        """Rows of the next call of each waiting claim."""
        return sum(lane.rows for lane in self._all_lanes())

    def add(self, claim: Claim) -> None:
        """Adds a claim; it may take part in the next call.

        Raises:
            ValueError: the claim is already here, needs no call, or a number is out of range.
        """
        if claim in self._places:
            raise ValueError("the claim is already in the batcher")
        if claim.left < 1 or min(claim.rows) < 1:
            raise ValueError(f"rows={list(claim.rows)} is invalid: calls of at least 1 row each")
        if not 0 < claim.priority < math.inf:
            raise ValueError(f"priority={claim.priority} is invalid: must be above 0 and finite")
        if not self._places:  # idle: nobody is owed anything
            self._lanes.clear()
            self._now = self._jumped = 0.0
        lanes = self._lanes.setdefault(claim.key, {})
        lane = lanes.get(claim.priority)
        if lane is None:
            lane = lanes[claim.priority] = Lane(claim.key, claim.priority)
        if not lane.live:
            lane.start = max(lane.start, self._now)
        lane.live += 1
        place = _Place(lane, lane.calls + claim.left, self._arrivals)
        self._arrivals += 1
        self._places[claim] = place
        lane.put(claim, place.due, place.arrival)
        if claim.deadline is not None:
            self._dated[claim] = claim.deadline

    def remove(self, claim: Claim) -> None:
        """Removes a claim, also one in a running call; an absent claim is no error."""
        place = self._places.get(claim)
        if place is None:
            return
        if place.running:
            self._stop(claim, place)
        else:
            place.lane.take(claim, place.due, place.arrival)
        self._forget(claim, place)

    def schedule(self, now: float | None = None, ahead: bool = False) -> list[Claim]:
        """Returns the claims of the next call and marks them as running.

        They stay until `advance` counts the call or `release` gives them back, and are in no
        other call until then.

        Args:
            now: seconds on the clock of the deadlines; without it deadlines have no effect.
            ahead: the device is still busy, so the call is only being prepared. Returns nothing
                if claims of a running call are next by their share, or if the rest of their lane
                would fill less than half a call: the caller asks again once the call is done.

        Returns:
            Claims of one key, empty if there is nothing to run.
        """
        lane = self._next_lane(ahead)
        if lane is None:
            return []
        urgent = self._urgent(now) if self._jumped <= 0 else []
        jump = bool(urgent)
        if jump:
            lane = self._places[urgent[0]].lane
        elif ahead and self._better_later(lane):
            return []
        chosen = self._fill(lane, urgent)
        self._charge(lane, chosen, jump)
        self._mark_running(chosen)
        return chosen

    def join(self, call: Sequence[Claim]) -> list[Claim]:
        """Returns claims that fit into a call which has not begun, and marks them as running.

        They are those that came since its claims were scheduled, or had no room in a smaller call.
        """
        key, free = call[0].key, self._capacity(call[0].key) - sum(c.next_rows for c in call)
        place = self._places.get(call[0])
        if key.alone or place is None:
            return []
        joined: list[Claim] = []
        for claim in self._candidates(place.lane, ()):
            if claim.next_rows <= free:
                joined.append(claim)
                free -= claim.next_rows
        before = sum(claim.next_rows for claim in call)
        rows = before + sum(claim.next_rows for claim in joined)
        work = self._work(key, rows) - self._work(key, before)
        for claim in joined:
            lane = self._places[claim].lane
            lane.start += max(0.0, work) * claim.next_rows / (rows - before) / lane.weight
        self._mark_running(joined)
        return joined

    def advance(self, claims: Iterable[Claim]) -> None:
        """Counts a call as done: each of its claims has had one more; finished ones leave.

        Claims that were removed while the call ran are skipped.

        Raises:
            ValueError: a claim is in no running call.
        """
        self._return(claims, 1)

    def release(self, claims: Iterable[Claim]) -> None:
        """Gives back claims whose call did not happen; they wait again, with nothing counted.

        Raises:
            ValueError: a claim is in no running call.
        """
        self._return(claims, 0)

    def _return(self, claims: Iterable[Claim], calls: int) -> None:
        for claim in claims:
            place = self._places.get(claim)
            if place is None:
                continue
            if not place.running:
                raise ValueError("the claim is in no running call")
            self._stop(claim, place)
            claim.done += calls
            if claim.left:
                place.lane.put(claim, place.due, place.arrival)
            else:
                self._forget(claim, place)

    def _mark_running(self, claims: Sequence[Claim]) -> None:
        for claim in claims:
            place = self._places[claim]
            place.lane.take(claim, place.due, place.arrival)
            place.lane.running_rows += claim.next_rows
            place.running = True
        self._running += len(claims)

    def _stop(self, claim: Claim, place: _Place) -> None:
        place.running = False
        place.lane.running_rows -= claim.next_rows
        self._running -= 1

    def _forget(self, claim: Claim, place: _Place) -> None:
        place.lane.live -= 1
        del self._places[claim]
        self._dated.pop(claim, None)

    # The choice over all lanes -------------------------------------------------------------

    def _all_lanes(self) -> Iterator[Lane]:
        return (lane for lanes in self._lanes.values() for lane in lanes.values())

    def _next_lane(self, with_running: bool) -> Lane | None:
        """The lane whose next call ends at the earliest tag; the oldest of equal ones."""
        best, earliest, gone = None, math.inf, []
        if not self.waiting:
            return None
        for lane in self._all_lanes():
            if not lane.live and lane.start <= self._now:
                gone.append(lane)
            if not lane.rows and not (with_running and lane.running_rows):
                continue
            finish = lane.start + self._work(lane.key, self._likely_rows(lane)) / lane.weight
            if finish < earliest:
                best, earliest = lane, finish
        for lane in gone:  # a tag in the past is what a new lane would get
            del self._lanes[lane.key][lane.priority]
            if not self._lanes[lane.key]:
                del self._lanes[lane.key]
        return best

    def _likely_rows(self, lane: Lane) -> int:
        """Rows of the lane's next call, running claims included."""
        rows = lane.rows + lane.running_rows
        return -(-rows // lane.live) if lane.key.alone else min(rows, self._capacity(lane.key))

    def _better_later(self, lane: Lane) -> bool:
        if not lane.rows:
            return True
        part = not lane.key.alone and 2 * lane.rows < self._capacity(lane.key)
        return part and lane.running_rows > 0

    def _work(self, key: CallKey, rows: int) -> float:
        if self._seconds is not None:
            return self._seconds(key, rows)
        return rows * key.height * key.width

    # Deadlines -----------------------------------------------------------------------------

    def _urgent(self, now: float | None) -> list[Claim]:
        """Waiting claims of one key whose deadlines are at risk but can be met, least slack first.

        At risk: what is left takes more than half of the time left after the longest call,
        because jumps take at most half of the work.
        """
        if now is None or self._seconds is None or not self._dated:
            return []
        longest = 0.0
        for key, lanes in self._lanes.items():
            rows = [self._likely_rows(lane) for lane in lanes.values() if lane.live]
            most = max(rows, default=1) if key.alone else min(sum(rows), self._capacity(key))
            call = self._seconds(key, max(1, most))
            longest = max(longest, call)
            for lane in lanes.values():
                lane.call = call
        risks = []
        for claim, deadline in self._dated.items():
            place = self._places[claim]
            needed = claim.left * place.lane.call
            slack = deadline - now - needed
            if 0 <= slack <= needed + longest and not place.running:
                risks.append((slack, place.arrival, claim))
        risks.sort()
        return [claim for _, _, claim in risks if claim.key == risks[0][2].key]

    # One call ------------------------------------------------------------------------------

    def _fill(self, lane: Lane, urgent: Sequence[Claim]) -> list[Claim]:
        """The claims of a call that `lane` leads: urgent ones, its own, then its siblings'."""
        free = self._capacity(lane.key)
        chosen: dict[Claim, None] = {}
        for claim in self._candidates(lane, urgent):
            if claim in chosen or (claim.next_rows > free and chosen):
                continue
            chosen[claim] = None
            free -= claim.next_rows
            if free <= 0 or lane.key.alone:
                break
        return list(chosen)

    def _candidates(self, lane: Lane, urgent: Sequence[Claim]) -> Iterator[Claim]:
        yield from urgent
        order = lane.shortest if lane.calls % 2 == 0 else lane.earliest
        yield from (entry[-1] for entry in order)
        siblings = [s for s in self._lanes[lane.key].values() if s is not lane and s.rows]
        if not siblings:
            return
        contended = any(other.rows and other.key != lane.key for other in self._all_lanes())
        for sibling in sorted(siblings, key=lambda s: s.start):
            # A lane that is ahead of its share rides along only at nobody's expense.
            if not contended or sibling.start <= self._now:
                yield from (entry[-1] for entry in sibling.earliest)

    def _charge(self, lane: Lane, chosen: Sequence[Claim], jump: bool) -> None:
        """Advances the tags of the lanes in a call by their parts of its work."""
        rows: dict[Lane, int] = {}
        for claim in chosen:
            owner = self._places[claim].lane
            rows[owner] = rows.get(owner, 0) + claim.next_rows
        total = sum(rows.values())
        work = self._work(lane.key, total)
        if jump:
            self._jumped += work
        else:
            self._jumped = max(self._jumped - work, -work)  # a credit lasts for one call
        lane.calls += 1
        if not jump:
            self._now = max(self._now, lane.start + work * rows[lane] / total / lane.weight)
            lane.start = self._now
            del rows[lane]
        for rider, part in rows.items():
            step = work * part / total / rider.weight
            # At most one such call ahead of all others, whatever it had while nobody waited.
            rider.start = max(rider.start, min(rider.start, self._now) + step)
