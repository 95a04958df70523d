"""When the texts of newcomers are encoded: at once, or together with those of the next ones.

An encoder call of many texts takes hardly longer than one of a single text where a call itself
is what costs, as on accelerators, and a call for every newcomer then holds back all images that
are being made. So newcomers gather until the time that they have waited, added up, is `WORTH` times
what their call costs the others: the rule of dynamic TCP acknowledgements (Dooly, Goldman and
Scott, STOC 1998). Where joining texts saves nothing, nobody waits. Knows no texts, models or
clocks.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence

WORTH = 2.0  # of the saved seconds: the UNet calls that follow a small encoder call are small too


class Gathering:
    """What joining the texts of two encoder calls saves, learned from calls."""

    def __init__(self) -> None:
        self._least: dict[int, float] = {}  # seconds of a call by its texts

    def observe(self, texts: int, seconds: float) -> None:
        """Learns from a call; the shortest of its size counts, which others disturbed least."""
        self._least[texts] = min(seconds, self._least.get(texts, seconds))

    @property
    def saved(self) -> float:
        """Seconds of a call that do not depend on its texts; 0 while that is not known."""
        few, many = min(self._least, default=0), max(self._least, default=0)
        if few == many:
            return 0.0
        a_text = max(0.0, self._least[many] - self._least[few]) / (many - few)
        return max(0.0, self._least[few] - few * a_text)

    def patience(self, waited: Sequence[float], others: int) -> float:
        """Seconds that newcomers may go on waiting; at most 0 when their texts are due.

        Args:
            waited: seconds that each newcomer has waited.
            others: requests that are being made; a single one is not worth a wait.
        """
        return (WORTH * self.saved * (others - 1) - sum(waited)) / len(waited)


def gathered(waiting: queue.SimpleQueue, patience: Callable[[list], float]) -> Iterator[list]:
    """Batches of what waits, each once `patience` with it is over, until None comes."""
    while True:
        batch = [waiting.get()]
        while batch[-1] is not None:
            seconds = patience(batch)
            try:
                batch.append(waiting.get(timeout=seconds) if seconds > 0 else waiting.get_nowait())
            except queue.Empty:
                if seconds <= 0:
                    break
        yield [item for item in batch if item is not None]
        if batch[-1] is None:
            return


def arrived(waiting: queue.SimpleQueue, most: int) -> list:
    """At most so many of those that wait now; None, the end, stays."""
    found: list = []
    while len(found) < most and not waiting.empty():
        item = waiting.get()
        if item is None:
            waiting.put(None)
            break
        found.append(item)
    return found
