"""`/metrics` of the server: what the engine and the front doors record reaches Triton.

One thread makes all changes, because the server dies of two at once. It flushes at most ten times
a second, so recording costs the engine no round trip to the server.
"""

from __future__ import annotations

import itertools
import logging
import queue
import time
from collections.abc import Iterable
from typing import Any

import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from twinbrush.engine.metrics import Metric
from twinbrush.engine.threads import Fail, start_guarded

log = logging.getLogger(__name__)
PERIOD = 0.1  # seconds between two flushes
MOST_WAITING = 100_000  # values; more are dropped while the server takes none

Change = tuple[Metric, float, tuple[str, ...]]


class TritonMetrics:
    """An `Observer` whose values appear on `/metrics`; a server without metrics gets none.

    Args:
        declared: the metrics that this process records; counters begin at 0.
        fail: called with a sentence when the thread dies.
    """

    def __init__(self, declared: Iterable[Metric], fail: Fail):
        self._changes: queue.SimpleQueue[Change | None] = queue.SimpleQueue()
        self._families: dict[Metric, Any] = {}
        self._metrics: dict[tuple[Metric, tuple[str, ...]], Any] = {}
        try:
            for metric in declared:
                kind = getattr(pb_utils.MetricFamily, metric.kind.upper())
                self._families[metric] = pb_utils.MetricFamily(metric.name, metric.help, kind)
        except pb_utils.TritonModelException:
            log.warning("the server has no metrics: nothing is counted")
            self._families.clear()
            self._thread = None
            return
        for metric in self._families:
            if metric.kind == "counter":
                for labels in itertools.product(*metric.labels.values()):
                    self.record(metric, 0, *labels)
        self._thread = start_guarded("metrics", self._flush_until_closed, fail)

    def record(self, metric: Metric, value: float, *labels: str) -> None:
        """See `Observer.record`."""
        if self._families and self._changes.qsize() < MOST_WAITING:
            self._changes.put((metric, value, labels))

    def close(self) -> None:
        """Flushes and ends the thread."""
        if self._thread is not None:
            self._changes.put(None)
            self._thread.join()

    def _flush_until_closed(self) -> None:
        while (change := self._changes.get()) is not None:
            time.sleep(PERIOD)
            waiting: list[Change | None] = [change]
            while not self._changes.empty():
                waiting.append(self._changes.get())
            self._flush(change for change in waiting if change is not None)
            if None in waiting:
                return

    def _flush(self, changes: Iterable[Change]) -> None:
        sums: dict[tuple[Metric, tuple[str, ...]], float] = {}
        for metric, value, labels in changes:
            if metric.kind == "histogram":
                self._metric(metric, labels).observe(value)
            elif metric.kind == "counter":
                sums[metric, labels] = sums.get((metric, labels), 0.0) + value
            else:
                sums[metric, labels] = value
        for (metric, labels), value in sums.items():
            made = self._metric(metric, labels)
            made.increment(value) if metric.kind == "counter" else made.set(value)

    def _metric(self, metric: Metric, labels: tuple[str, ...]) -> Any:
        if (metric, labels) not in self._metrics:
            named = dict(zip(metric.labels, labels, strict=True))
            buckets = list(metric.buckets) if metric.kind == "histogram" else None
            made = self._families[metric].Metric(named, buckets)
            self._metrics[metric, labels] = made
        return self._metrics[metric, labels]
