"""Each caller's rate, live requests and outstanding work, held to its limits. Knows no HTTP."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gateway.errors import ApiError
from gateway.keys import Key

MINUTE = 60.0  # seconds
# OpenAI's: what a minute has, what is left of it, and until when it is whole again.
RATE_HEADERS = tuple(f"x-ratelimit-{what}-requests" for what in ("limit", "remaining", "reset"))
SOON = 1.0  # seconds: when to try again where only the end of a request frees a place


@dataclass
class _Use:
    """What a caller has taken; `tokens` is what is left of its minute's requests."""

    tokens: float
    filled: float
    live: int = 0
    work: float = 0.0


class Meter:
    """Counts what callers use. For one event loop.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._uses: dict[str, _Use] = {}

    @contextmanager
    def admit(self, key: Key, work: float) -> Iterator[None]:
        """Holds a request's place while it lives.

        Raises:
            ApiError: 429, with the seconds after which to try again.
        """
        use = self._use(key)
        self._check_places(key, use, work)
        self._take_token(key, use)
        use.live += 1
        use.work += work
        try:
            yield
        finally:
            use.live -= 1
            use.work -= work

    def headers(self, key: Key) -> dict[str, str]:
        """`RATE_HEADERS` of a key that has a rate; none otherwise."""
        rate = key.limits.requests_per_minute
        if rate is None:
            return {}
        use = self._use(key)
        self._fill(use, rate)
        left, reset = max(0, math.floor(use.tokens)), (rate - use.tokens) * MINUTE / rate
        return dict(zip(RATE_HEADERS, (f"{rate:g}", str(left), _duration(reset)), strict=True))

    def _use(self, key: Key) -> _Use:
        full = key.limits.requests_per_minute or 0.0
        return self._uses.setdefault(key.name, _Use(full, self._clock()))

    def _check_places(self, key: Key, use: _Use, work: float) -> None:
        limits = key.limits
        if limits.concurrent is not None and use.live >= limits.concurrent:
            raise _too_much(f"{use.live} requests of this key are live; {limits.concurrent} may be")
        if limits.work is not None and work > limits.work:
            text = f"the request is {work:.0f} steps of pictures; this key may have {limits.work:g}"
            raise ApiError(400, text, code="too_much_work")
        if limits.work is not None and use.work + work > limits.work:
            raise _too_much(
                f"{use.work:.0f} steps of pictures of this key are outstanding and the request is "
                f"{work:.0f} more; {limits.work:g} may be"
            )

    def _take_token(self, key: Key, use: _Use) -> None:
        rate = key.limits.requests_per_minute
        if rate is None:
            return
        self._fill(use, rate)
        if use.tokens < min(1.0, rate):
            wait = (min(1.0, rate) - use.tokens) * MINUTE / rate
            raise _too_much(f"this key may send {rate:g} requests a minute", wait)
        use.tokens -= 1

    def _fill(self, use: _Use, rate: float) -> None:
        now = self._clock()
        use.tokens = min(rate, use.tokens + (now - use.filled) * rate / MINUTE)
        use.filled = now


def _duration(seconds: float) -> str:
    """As OpenAI writes it: `6m0s`, `1.5s`, `20ms`."""
    milliseconds = math.ceil(round(1000 * seconds, 3))  # as floats add up
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:g}s"


def _too_much(text: str, retry_after: float = SOON) -> ApiError:
    return ApiError(
        429, f"Rate limit reached: {text}.", code="rate_limit_exceeded", type="rate_limit_error",
        retry_after=retry_after,
    )  # fmt: skip
