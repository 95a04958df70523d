"""TLS files of a client, checked before gRPC sees them: it names neither file nor fault."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from twinbrush_client.errors import invalid


def credentials(
    authorities: str | Path | None, cert: str | Path | None, key: str | Path | None
) -> grpc.ChannelCredentials:
    """gRPC's credentials of PEM files.

    Args:
        authorities: whose certificates are trusted; None are the public ones that gRPC knows.
        cert, key: of the client, where the server asks for them.

    Raises:
        InvalidRequest: a file holds something else.
        OSError: a file cannot be read.
    """
    roots = None if authorities is None else _authorities(Path(authorities))
    if cert is None or key is None:
        return grpc.ssl_channel_credentials(roots)
    chain, private = Path(cert).read_bytes(), Path(key).read_bytes()
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_cert_chain(cert, key, password=lambda: "")  # else OpenSSL asks the terminal
    except (ssl.SSLError, ValueError):
        allowed = f"must be the private key of cert {cert}, both in PEM, the key without a password"
        raise invalid("key", str(key), allowed) from None
    return grpc.ssl_channel_credentials(roots, private, chain)


def _authorities(file: Path) -> bytes:
    data = file.read_bytes()
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=data.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise invalid("tls", str(file), "must be a PEM file of certificates") from None
    return data
