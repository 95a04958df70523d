"""Claims on UNet calls, and the lanes in which they wait.

Knows no arrays, no clock and no threads; `batcher` chooses between lanes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CallKey:
    """Claims of equal key may share a call of `model` on latents of `height` × `width` cells.

    Attributes:
        alone: a claim of this key never shares a call.
        tokens: of the text in each row. UNets attend to all of them without a mask, so filling a
            shorter text up would change its picture.
    """

    model: str
    height: int
    width: int
    alone: bool = False
    tokens: int = 0

    @property
    def cells(self) -> int:
        """Latent cells of a row."""
        return self.height * self.width


@dataclass(eq=False)
class Claim:
    """One image's claim on UNet calls.

    Attributes:
        key: claims of equal key may share a call.
        rows: UNet rows of each call that it needs: 2 with guidance, 1 without.
        priority: weight of its share.
        deadline: seconds on the caller's clock by which its last call should be done.
        done: calls that it has had; the batcher counts them.
    """

    key: CallKey
    rows: Sequence[int]
    priority: float = 1.0
    deadline: float | None = None
    done: int = 0

    @property
    def left(self) -> int:
        """Calls that it still needs."""
        return len(self.rows) - self.done

    @property
    def next_rows(self) -> int:
        """Rows of its next call."""
        return self.rows[self.done]


@dataclass(eq=False)
class Lane:
    """The claims of one key and priority; running claims are in neither order."""

    key: CallKey
    priority: float
    start: float = 0.0  # tag at which its next call starts
    live: int = 0  # claims, waiting or running
    rows: int = 0  # of the waiting claims
    running_rows: int = 0
    calls: int = 0
    call: float = 0.0  # seconds of a call of its key, while deadlines are looked at
    shortest: list[tuple] = field(default_factory=list)  # (left, due, arrival, claim)
    earliest: list[tuple] = field(default_factory=list)  # (due, arrival, claim)

    @property
    def weight(self) -> float:
        return self.priority * self.live

    def put(self, claim: Claim, due: int, arrival: int) -> None:
        insort(self.shortest, (claim.left, due, arrival, claim))
        insort(self.earliest, (due, arrival, claim))
        self.rows += claim.next_rows

    def take(self, claim: Claim, due: int, arrival: int) -> None:
        del self.shortest[bisect_left(self.shortest, (claim.left, due, arrival))]
        del self.earliest[bisect_left(self.earliest, (due, arrival))]
        self.rows -= claim.next_rows
