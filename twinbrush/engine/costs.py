"""What UNet calls cost: seconds by key and rows, learned from the calls of this process.

Rows are kept in classes of powers of two, so a key has a handful of estimates. Knows nothing of
images, models or clocks; callers hold their own lock.
"""

from __future__ import annotations

from dataclasses import dataclass

from twinbrush.engine.batcher import CallKey

SMOOTHING = 0.2  # weight of the latest call, once a class has had as many as make it the mean
LOSS = 0.03  # of rows a second that a smaller call may cost
PROBES_AT_FIRST, PROBE_EARLY, PROBE_LATE = 64, 4, 64  # calls; then every so many calls


@dataclass
class _Estimate:
    """Means of the calls of one key whose rows are of one class."""

    rows: float
    seconds: float
    calls: int = 1

    def add(self, rows: int, seconds: float) -> None:
        self.calls += 1
        weight = max(SMOOTHING, 1 / self.calls)
        self.rows += weight * (rows - self.rows)
        self.seconds += weight * (seconds - self.seconds)


class Costs:
    """Seconds of UNet calls, and the rows beyond which a larger call gains nothing."""

    def __init__(self) -> None:
        self._estimates: dict[CallKey, dict[int, _Estimate]] = {}
        self._calls: dict[CallKey, int] = {}
        self._enough: dict[tuple[CallKey, int], int] = {}  # until the key's next call
        self._pace: float | None = None  # seconds a row and latent cell, over all keys

    def observe(self, key: CallKey, rows: int, seconds: float) -> None:
        """Learns from a call that took `seconds`."""
        for known in [known for known in self._enough if known[0] == key]:
            del self._enough[known]
        self._calls[key] = self._calls.get(key, 0) + 1
        classes = self._estimates.setdefault(key, {})
        if estimate := classes.get(_row_class(rows)):
            estimate.add(rows, seconds)
        else:
            classes[_row_class(rows)] = _Estimate(rows, seconds)
        pace = seconds / (rows * key.height * key.width)
        self._pace = pace if self._pace is None else self._pace + SMOOTHING * (pace - self._pace)

    def seconds(self, key: CallKey, rows: int) -> float:
        """The estimated time of a call: between the key's classes, else in proportion to rows.

        A key without calls has the pace of the others; before the first call of all, a row and
        cell takes a second.
        """
        classes = self._estimates.get(key)
        if not classes:
            return (1.0 if self._pace is None else self._pace) * rows * key.height * key.width
        below = above = None
        for estimate in classes.values():
            if estimate.rows <= rows and (below is None or estimate.rows > below.rows):
                below = estimate
            if estimate.rows >= rows and (above is None or estimate.rows < above.rows):
                above = estimate
        if below is None or above is None or below is above:
            nearest = below or above
            assert nearest is not None
            return nearest.seconds * rows / nearest.rows
        part = (rows - below.rows) / (above.rows - below.rows)
        return below.seconds + part * (above.seconds - below.seconds)

    def enough_rows(self, key: CallKey, most: int) -> int:
        """The fewest rows at which a call yields nearly as many rows a second as any.

        A late short request then waits for a short call where long ones gain nothing, as on most
        CPUs. Some calls try other row counts, since only calls that ran are known; the choice
        changes with `observe` alone.

        Args:
            most: rows that a call may have; also the answer while nothing is known.
        """
        cached = self._enough.get((key, most))
        if cached is None:
            cached = self._enough[key, most] = self._choose_rows(key, most)
        return cached

    def _choose_rows(self, key: CallKey, most: int) -> int:
        calls = self._calls.get(key, 0)
        every = PROBE_EARLY if calls < PROBES_AT_FIRST else PROBE_LATE
        if calls % every == every - 1:
            return max(1, most >> (calls // every % most.bit_length()))
        known = sorted((e for e in self._estimates.get(key, {}).values()), key=lambda e: e.rows)
        known = [(e.rows, e.seconds / e.rows) for e in known if e.rows <= most]
        if len(known) < 2 or 2 * known[-1][0] <= most:
            return most  # what large calls gain is not known
        best = min(_per_row_at(most, *known[-2:]), *(per_row for _, per_row in known))
        enough = min((r for r, per_row in known if per_row <= (1 + LOSS) * best), default=most)
        return most if 2 * enough > most else round(enough)


def _per_row_at(rows: int, a: tuple[float, float], b: tuple[float, float]) -> float:
    """Seconds a row of a larger call, from two (rows, seconds a row): a constant and a slope."""
    (rows_a, per_row_a), (rows_b, per_row_b) = a, b
    constant = (per_row_a - per_row_b) / (1 / rows_a - 1 / rows_b)
    return per_row_b - constant * (1 / rows_b - 1 / rows)


def _row_class(rows: int) -> int:
    return (rows - 1).bit_length()  # 1, 2, 3 to 4, 5 to 8, …
