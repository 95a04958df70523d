"""Addresses and ports of IPv4 and IPv6: how Triton, URLs and messages write them."""

from __future__ import annotations

import contextlib
import ipaddress
import socket

from twinbrush.server.errors import ServerError

WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def host_port(address: str, port: int) -> str:
    """`address:port` as URLs and gRPC write it: an IPv6 address stands in brackets."""
    return f"{_bracketed(address)}:{port}"


def local(address: str) -> str:
    """The address by which this machine reaches a server that listens on `address`."""
    return WILDCARDS.get(address, address)


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches `address`."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return address == "localhost"


def for_grpc(address: str) -> str:
    """The value of Triton's `--grpc-address`."""
    return _bracketed(address)


def for_http(address: str) -> str:
    """The value of Triton's `--http-address` and `--metrics-address`."""
    return f"ipv6:{address}" if ":" in address else address


def chosen_ports(address: str, *ports: int) -> list[int]:
    """The ports, each 0 replaced by one that is free.

    Raises:
        ServerError: this machine does not have the address.
    """
    family = _family(address)
    with contextlib.ExitStack() as probes:
        chosen = []
        for port in ports:
            probe = probes.enter_context(socket.socket(family))
            try:
                probe.bind((address, 0))
            except OSError as error:
                raise ServerError(_unusable(address, error), worth_another_try=False) from None
            chosen.append(port or probe.getsockname()[1])
        return chosen


def check_ports(address: str, ports: dict[str, int]) -> None:
    """Checks that each port, by its flag, is free and serves one endpoint.

    Raises:
        ServerError: one is not; the message names its flag.
    """
    family = _family(address)
    taken: dict[int, str] = {}
    for flag, port in ports.items():
        if (other := taken.setdefault(port, flag)) != flag:
            text = f"{other} and {flag} are both {port}: each needs a port of its own"
            raise ServerError(text, worth_another_try=False)
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except (OSError, OverflowError) as error:
                reason = getattr(error, "strerror", None) or error
                text = f"port {port} of {address}: {reason}; choose another: {flag}"
                raise ServerError(text, worth_another_try=False) from None


def _family(address: str) -> socket.AddressFamily:
    try:
        return socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]
    except (OSError, UnicodeError) as error:
        raise ServerError(_unusable(address, error), worth_another_try=False) from None


def _unusable(address: str, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or error
    return f"--address {address}: {reason}; give an address of this machine, such as 127.0.0.1"


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
