"""Waits of the launcher that end early: when a signal comes, or when a process ends."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterable

# Between two looks at processes whose end this kernel, or what confines this process, does not
# report.
POLL_SECONDS = 0.25
SIGNALLED = 128  # a shell's exit code for a signal is that much more


class Stopped(Exception):
    """A signal asked this process to end, or its command has ended."""

    def __init__(self, exit_code: int):
        super().__init__()
        self.exit_code = exit_code


class Signals:
    """Signals that ask this process to end; for the main thread, once a process.

    Attributes:
        come: their numbers, in order.

    Args:
        numbers: of the signals.
    """

    def __init__(self, numbers: Iterable[int]):
        self.come: list[int] = []
        self._woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._numbers = tuple(numbers)
        for number in self._numbers:
            signal.signal(number, lambda number, frame: self.come.append(number))

    def ignore(self) -> None:
        """Lets later signals do nothing; for the end, when Python no longer handles any."""
        signal.set_wakeup_fd(-1)
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)

    def wait(self, seconds: float, processes: Iterable[int] = ()) -> None:
        """Waits, at most until one of some processes ends.

        Raises:
            Stopped: a signal has come; only here, so that it cannot cut a clean-up short.
        """
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        with contextlib.ExitStack() as opened:
            for pid in processes:
                try:
                    file = os.pidfd_open(pid)
                except (OSError, AttributeError):
                    seconds = min(seconds, POLL_SECONDS)
                    continue
                opened.callback(os.close, file)
                poll.register(file, select.POLLIN)
            if not self.come:
                poll.poll(seconds * 1000)
        with contextlib.suppress(BlockingIOError):
            os.read(self._woken, select.PIPE_BUF)
        if self.come:
            raise Stopped(SIGNALLED + self.come[0])
