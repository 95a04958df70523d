"""The connections of clients, and what of their answers this machine has not got rid of.

Reads the kernel's tables of this network namespace. Knows no protocol above TCP.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
OPEN = ("01", "08")  # states: established, and one that only the client has closed


def open_connections(
    ports: Collection[int], tables: Collection[Path] = TABLES
) -> dict[tuple[str, str], int]:
    """The connections that clients have to some ports of this machine.

    Returns:
        By both ends, as the kernel writes them: bytes that the client's machine has not taken.
    """
    found = {}
    for table in tables:
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:  # no IPv6, or a confined process
            continue
        for line in lines:
            _, here, there, state, queues = line.split()[:5]
            if state in OPEN and int(here.rpartition(":")[2], 16) in ports:
                found[here, there] = int(queues.partition(":")[0], 16)
    return found
