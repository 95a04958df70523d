"""Why a server did not start, or ended."""

from __future__ import annotations


class ServerError(Exception):
    """A server could not start or ended by itself.

    `worth_another_try` is False where the next start would fail in the same way. `passing` is
    True where a stub gave up or the server crashed during the start without a reason, which a
    busy machine can cause.
    """

    def __init__(self, message: str, worth_another_try: bool, passing: bool = False):
        super().__init__(message)
        self.worth_another_try, self.passing = worth_another_try, passing
