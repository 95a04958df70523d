"""Processes as `/proc` shows them: who is whose child, who still runs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
from pathlib import Path

PROC = Path("/proc")
STUB = "triton_python_backend_stub"  # the program of Triton's Python models
PARENT_DEATH_SIGNAL = 1  # of prctl
MOST_FILES = 1 << 16


def children(parent: int) -> list[int]:
    """The process ids of a process's children, those that ended and were not collected too.

    Reads the children lists of the parent's threads; a kernel that was built without them
    (CONFIG_PROC_CHILDREN) makes it look at every process.
    """
    threads = f"{PROC}/{parent}/task"
    try:
        names = os.listdir(threads)
    except OSError:
        return []  # it has ended
    found, lists = [], 0
    for name in names:
        try:
            with open(f"{threads}/{name}/children") as file:
                found += [int(pid) for pid in file.read().split()]
                lists += 1
        except OSError:
            continue  # the thread ended
    return found if lists else _children_by_search(parent)


def _children_by_search(parent: int) -> list[int]:
    found = []
    for folder in PROC.glob("[0-9]*"):
        fields = stat(int(folder.name))
        if fields is not None and int(fields[1]) == parent:
            found.append(int(folder.name))
    return found


def stat(pid: int) -> list[str] | None:
    """Fields of `/proc/PID/stat` from the state on, or None where there is no such process."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def program(pid: int) -> str:
    """The program on the command line of a process, "" where it cannot be read."""
    try:
        line = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return ""
    return line.partition(b"\0")[0].decode("utf-8", "replace")


def start_time(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; with the id it names one process for good.

    None where the process has ended.
    """
    fields = stat(pid)
    return None if fields is None or fields[0] in "ZX" else fields[19]


def end_with_parent() -> None:
    """In a child process: asks the kernel for SIGTERM when the parent is gone, however it went."""
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)


def allow_many_files() -> None:
    """Raises this process's limit of open files, and of its children, as far as it may go.

    Each connection takes one; with the usual 1,024, idle clients could keep all others out.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):  # a confined process keeps what it has
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
