"""Servers' names become addresses: a DNS name may stand for several. Knows no gRPC."""

from __future__ import annotations

import asyncio
import ipaddress
import socket

LOCAL = "localhost"  # one server, though it has two addresses


def split(server: str) -> tuple[str, int]:
    """Host and port of `host:port`; an IPv6 address stands in brackets.

    Raises:
        ValueError: it is not of that form.
    """
    host, colon, port = server.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"--server {server} is invalid: must be host:port, such as 127.0.0.1:8001")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == LOCAL


async def resolve(server: str) -> list[str]:
    """The addresses behind `host:port`, in a fixed order; IPv4 alone where there is any.

    Raises:
        OSError: the name is not known.
    """
    host, port = split(server)
    if host == LOCAL or _is_address(host):
        return [server]
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    of_4 = {info[4][0] for info in found if info[0] == socket.AF_INET}
    of_6 = {f"[{info[4][0]}]" for info in found if info[0] == socket.AF_INET6}
    return [f"{address}:{port}" for address in sorted(of_4 or of_6)]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
