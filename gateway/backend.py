"""One server behind the gateway: its client, what it serves, its load, and whether it is well."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from twinbrush_client import AsyncClient, ServerInfo, TwinbrushError

log = logging.getLogger(__name__)
FIRST_HOLD, LONGEST_HOLD = 1.0, 30.0  # seconds that an ejected server is left alone
PROBE_TIMEOUT = 10.0  # seconds; a busy server answers late


class Backend:
    """A server at one address.

    Args:
        timeout: seconds that a request may take.
        options: of a `Connection`, such as `tls`.

    Attributes:
        info: what it serves; None until it has answered once.
        outstanding: work of its live requests, in steps of pictures at the native size.
    """

    def __init__(self, address: str, timeout: float, options: Mapping[str, Any] | None = None):
        self.address = address
        self._timeout, self._options = timeout, dict(options or {})
        self.client = self._connect()
        self.info: ServerInfo | None = None
        self.since = int(time.time())  # the epoch's seconds when `info` came
        self.outstanding = 0.0
        self.turn = 0  # of the last request that it got
        self._ejected_until, self._hold = 0.0, FIRST_HOLD
        self._answers = False
        self._fault_logged = False

    @property
    def healthy(self) -> bool:
        return self._answers and time.monotonic() >= self._ejected_until

    @property
    def checkpoint(self) -> str | None:
        return self.info.checkpoint if self.info else None

    async def probe(self) -> None:
        """Asks what it serves, through the front door that paints: that shows that it can."""
        try:
            info = await self.client.info(timeout=PROBE_TIMEOUT)
        except TwinbrushError as error:
            self._answers = False
            if not self._fault_logged:  # once, not at every look
                log.warning("%s is not ready: %s", self.address, str(error))
            self._fault_logged = True
            if not self.outstanding:  # a server that drains waits until its clients have left
                left, self.client = self.client, self._connect()
                await left.close()
            return
        if info != self.info:
            self.info, self.since = info, int(time.time())
        self._answers, self._fault_logged = True, False

    def _connect(self) -> AsyncClient:
        return AsyncClient(self.address, self._timeout, max_retries=0, **self._options)

    def eject(self) -> None:
        """Leaves it alone for a while, longer each time until it finishes a request again."""
        self._ejected_until = time.monotonic() + self._hold
        self._hold = min(2 * self._hold, LONGEST_HOLD)

    def succeeded(self) -> None:
        self._ejected_until, self._hold, self._answers = 0.0, FIRST_HOLD, True

    @contextmanager
    def working(self, work: float) -> Iterator[None]:
        """While a request of that much work is with it."""
        self.outstanding += work
        try:
            yield
        finally:
            self.outstanding -= work
