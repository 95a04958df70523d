"""Which requests the engine takes: bounds on their number and on their work, and deadlines.

Work is in units of one UNet row at the native size (`Planner.work`). Knows nothing of models.
"""

from __future__ import annotations

import math

from twinbrush.engine.fields import shown
from twinbrush.engine.generation import EngineError, Generation

SMOOTHING = 0.1  # weight of the latest observation of the pace
# For how long a full queue is taken to stay full: a share of the time that its work takes, so that
# it never runs dry meanwhile, and at most so many seconds.
HOLD_SHARE, LONGEST_HOLD = 0.02, 0.25


class Admission:
    """The live requests. Callers hold their own lock.

    Args:
        max_requests: requests that may live at once.
        max_work: work that may be outstanding at once; a request with more is taken only when
            nothing else lives.
        client_share: of both, that the requests of one named client may have; each client has at
            least one request.
    """

    def __init__(self, max_requests: int, max_work: float, client_share: float = 1.0):
        self._max_requests, self._max_work = max_requests, max_work
        self._client_share = client_share
        self.live: set[Generation] = set()
        self.outstanding = 0.0
        self.pace = 1.0  # seconds a unit of work; a guess until a call was observed
        self._observed = False

    def add(self, generation: Generation, now: float) -> None:
        """Takes a request in.

        Raises:
            EngineError: RESOURCE_EXHAUSTED, with the seconds after which to retry, when a bound is
                reached; DEADLINE_EXCEEDED when the request cannot meet its deadline.
        """
        self._check_client(generation)
        self.check_room()
        after = self._seconds(self.outstanding)
        if self.live and self.outstanding + generation.work > self._max_work:
            text = f"the queue is full ({self.outstanding:.0f} of {self._max_work:.0f} units of"
            text += f" work, the request needs {generation.work:.0f}): retry after {after:.0f} s"
            raise EngineError("RESOURCE_EXHAUSTED", text, after, "work_full")
        if generation.deadline is not None:
            needed = self.pace * generation.work if self._observed else 0.0
            if now + needed > generation.deadline:
                text = f"deadline_ms is too short: the request alone takes about {needed:.1f} s"
                raise EngineError("DEADLINE_EXCEEDED", text, reason="deadline")
        self.live.add(generation)
        self.outstanding += generation.work

    def check_room(self) -> None:
        """Raises EngineError where any request would be refused, whatever it asks for."""
        if len(self.live) < self._max_requests:
            return
        after = self._seconds(self.outstanding)
        text = f"the queue is full ({self._max_requests} requests): retry after {after:.0f} s"
        busy = self.pace * self.outstanding if self._observed else 0.0
        hold = min(HOLD_SHARE * busy, LONGEST_HOLD)
        raise EngineError("RESOURCE_EXHAUSTED", text, after, "queue_full", hold)

    def _seconds(self, work: float) -> float:
        """After how many seconds so much work is done, at least 1."""
        return max(1.0, math.ceil(self.pace * work) if self._observed else 1.0)

    def _check_client(self, generation: Generation) -> None:
        """Raises EngineError where a named client has its share of the queue already."""
        name = generation.request.client
        theirs = [g for g in self.live if g.request.client == name] if name else []
        if not theirs:
            return
        work = sum(g.work for g in theirs)
        most = self._client_share * self._max_work
        requests = max(1, int(self._client_share * self._max_requests))
        if work + generation.work > most:
            has = f"{work:.0f} of {most:.0f} units of work, the request needs {generation.work:.0f}"
        elif len(theirs) + 1 > requests:
            has = f"{len(theirs)} of {requests:g} requests"
        else:
            return
        after = self._seconds(work)
        text = f"client={shown(name)} has its share of the queue ({has}): retry after {after:.0f} s"
        raise EngineError("RESOURCE_EXHAUSTED", text, after, "client_full")

    def remove(self, generation: Generation) -> None:
        self.live.discard(generation)
        self.outstanding = self.outstanding - generation.work if self.live else 0.0

    def complete(self, generation: Generation, work: float) -> None:
        """Counts a part of a live request's work as done."""
        if generation in self.live:
            done = min(work, generation.work)
            generation.work -= done
            self.outstanding -= done

    def observe(self, work: float, seconds: float) -> None:
        """Learns the pace from a UNet call."""
        self.pace += (seconds / work - self.pace) * (SMOOTHING if self._observed else 1.0)
        self._observed = True

    def overdue(self, now: float) -> list[Generation]:
        """Live requests whose deadline has passed."""
        return [g for g in self.live if g.deadline is not None and g.deadline <= now]
