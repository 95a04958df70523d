"""The gateway's state that all requests share: whether it drains, and how many are live."""

from __future__ import annotations


class Gate:
    """Open until a drain begins; then new requests are refused, and live ones finish."""

    def __init__(self) -> None:
        self.draining = False
        self.live = 0  # requests that hold up a drain
