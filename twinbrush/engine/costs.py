"""What UNet calls cost: seconds by key and rows, learned from the calls of this process.

Rows are kept in classes of powers of two, so a key has a handful of estimates. Knows nothing of
images, models or clocks; callers hold their own lock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from twinbrush.engine.claims import CallKey

SMOOTHING = 0.2  # weight of the latest call, once a class has had as many as make it the mean
SMALL = 4  # rows: calls of at most that many are never made smaller
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


@dataclass
class _KeyCosts:
    """The estimates of one key by class of rows, and answers that hold until its next call."""

    classes: dict[int, _Estimate] = field(default_factory=dict)
    calls: int = 0
    seconds: dict[int, float] = field(default_factory=dict)  # by rows
    enough: dict[int, int] = field(default_factory=dict)  # by the most rows of a call


class Costs:
    """Seconds of UNet calls, and the rows beyond which a larger call gains nothing."""

    def __init__(self) -> None:
        self._keys: dict[CallKey, _KeyCosts] = {}
        self._pace: float | None = None  # seconds a row and latent cell, over all keys

    def observe(self, key: CallKey, rows: int, seconds: float) -> None:
        """Learns from a call that took `seconds`."""
        costs = self._keys.setdefault(key, _KeyCosts())
        costs.calls += 1
        costs.seconds.clear()
        costs.enough.clear()
        if estimate := costs.classes.get(_row_class(rows)):
            estimate.add(rows, seconds)
        else:
            costs.classes[_row_class(rows)] = _Estimate(rows, seconds)
        pace = seconds / (rows * key.height * key.width)
        self._pace = pace if self._pace is None else self._pace + SMOOTHING * (pace - self._pace)

    def seconds(self, key: CallKey, rows: int) -> float:
        """The estimated time of a call: between the key's classes, else in proportion to rows.

        A key without calls has the pace of the others; before the first call of all, a row and
        cell takes a second.
        """
        costs = self._keys.get(key)
        if costs is None:
            return (1.0 if self._pace is None else self._pace) * rows * key.height * key.width
        if rows not in costs.seconds:
            costs.seconds[rows] = _interpolate(costs.classes.values(), rows)
        return costs.seconds[rows]

    def enough_rows(self, key: CallKey, most: int) -> int:
        """The fewest rows at which a call yields nearly as many rows a second as any.

        A late short request then waits for a short call where long ones gain nothing, as on most
        CPUs. Some calls try other row counts, since only calls that ran are known; the choice
        changes with `observe` alone.

        Args:
            most: rows that a call may have; also the answer while nothing is known.
        """
        costs = self._keys.get(key)
        if costs is None or most <= SMALL:
            return most
        if most not in costs.enough:
            costs.enough[most] = _choose_rows(costs, most)
        return costs.enough[most]


def _interpolate(estimates: Iterable[_Estimate], rows: int) -> float:
    below = above = None
    for estimate in estimates:
        if estimate.rows <= rows and (below is None or estimate.rows > below.rows):
            below = estimate
        if estimate.rows >= rows and (above is None or estimate.rows < above.rows):
            above = estimate
    if below and above and below is not above:
        part = (rows - below.rows) / (above.rows - below.rows)
        return below.seconds + part * (above.seconds - below.seconds)
    nearest = below or above
    if nearest is None:
        raise ValueError("no call was observed")
    return nearest.seconds * rows / nearest.rows


def _choose_rows(costs: _KeyCosts, most: int) -> int:
    every = PROBE_EARLY if costs.calls < PROBES_AT_FIRST else PROBE_LATE
    if costs.calls % every == every - 1:
        return max(1, most >> (costs.calls // every % most.bit_length()))
    estimates = sorted(costs.classes.values(), key=lambda estimate: estimate.rows)
    known = [(e.rows, e.seconds / e.rows) for e in estimates if e.rows <= most]
    if len(known) < 2 or 2 * known[-1][0] <= most:
        return most  # what large calls gain is not known
    best = min(_per_row_at(most, *known[-2:]), *(per_row for _, per_row in known))
    enough = min((rows for rows, per_row in known if per_row <= (1 + LOSS) * best), default=most)
    return most if 2 * enough > most else round(enough)


def _per_row_at(rows: int, a: tuple[float, float], b: tuple[float, float]) -> float:
    """Seconds a row of a larger call, from two (rows, seconds a row): a constant and a slope."""
    (rows_a, per_row_a), (rows_b, per_row_b) = a, b
    constant = (per_row_a - per_row_b) / (1 / rows_a - 1 / rows_b)
    return per_row_b - constant * (1 / rows_b - 1 / rows)


def _row_class(rows: int) -> int:
    return (rows - 1).bit_length()  # 1, 2, 3 to 4, 5 to 8, …
