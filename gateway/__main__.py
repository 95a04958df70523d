"""`python -m gateway`: serves HTTP in front of Twinbrush servers; `hash-key` makes API keys."""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import ssl
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from gateway import addresses, keys
from gateway.app import Settings, create_app
from gateway.gate import Gate
from gateway.pool import Pool
from gateway.server import run
from twinbrush_client.connection import Connection
from twinbrush_client.options import PANEL, Access, Group, with_options_of

KEYS_VARIABLE = "TWINBRUSH_API_KEYS"
MEGABYTE = 1 << 20
ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/?#\s]+")
ADDRESS = re.compile(r"https?://[^?#\s]+")
app = typer.Typer(cls=Group, add_completion=False)


@app.callback(invoke_without_command=True)
@functools.partial(with_options_of, Access, "access")
def serve(
    context: typer.Context,
    server: Annotated[
        list[str] | None,
        typer.Option(envvar="TWINBRUSH_SERVER", help="gRPC host:port of a server; repeat it for "
                     "several. A DNS name may stand for several. Default: 127.0.0.1:8001.",
                     rich_help_panel=PANEL),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8080,
    keys_file: Annotated[
        Path | None, typer.Option(help=f"TOML file of API keys; {KEYS_VARIABLE} holds plain ones.")
    ] = None,
    no_keys: Annotated[
        bool, typer.Option("--no-keys", help="Listen beyond loopback without keys all the same.")
    ] = False,
    requests_per_minute: Annotated[
        float | None, typer.Option(min=0.001, help="Of each key, where its entry says nothing.")
    ] = None,
    concurrent: Annotated[
        int | None, typer.Option(min=1, help="Live requests of each key.")
    ] = None,
    work: Annotated[
        float | None,
        typer.Option(min=1, help="Outstanding steps of pictures at the native size of each key."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin whose pages may call the gateway; repeatable.")
    ] = None,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Size of a request's body.")] = 16,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may take.")] = 300,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="Time that live requests have to end after SIGTERM.")
    ] = 30,
    public_url: Annotated[
        str | None, typer.Option(help="What clients reach the gateway by, for pictures' URLs.")
    ] = None,
    files_mb: Annotated[float, typer.Option(min=0, help="Memory for pictures behind URLs.")] = 256,
    files_seconds: Annotated[
        float, typer.Option(min=1, help="Time that a picture's URL lives.")
    ] = 3600,
    ssl_certfile: Annotated[Path | None, typer.Option(help="Certificate, for HTTPS.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="The certificate's key.")] = None,
    no_page: Annotated[
        bool, typer.Option("--no-page", help="Serve the APIs alone, which takes less memory.")
    ] = False,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Log every request.")
    ] = False,
    *,
    access: Access,
) -> None:  # fmt: skip
    """Serves OpenAI's and A1111's APIs, and the page, until Ctrl-C."""
    if context.invoked_subcommand is not None:
        return
    limits = keys.Limits(requests_per_minute, concurrent, work)
    servers = server or ["127.0.0.1:8001"]
    try:
        _check_finite(context.params)
        for each in servers:
            addresses.split(each)
        found = keys.plain_keys(os.environ.get(KEYS_VARIABLE, ""), limits)
        found += keys.read_keys(keys_file, limits) if keys_file else []
        keys.check_distinct(found)
        _check_certificate(ssl_certfile, ssl_keyfile)
        _check_urls(cors_origin or (), public_url)
        connection = _connection(access)
    except ValueError as error:
        raise _refused(str(error)) from None
    if not found and not no_keys and not addresses.is_loopback(host):
        raise _refused(
            f"--host {host} is reached from other machines: give --keys-file or {KEYS_VARIABLE}, "
            "or --no-keys to let everybody in"
        )
    logging.basicConfig(format="gateway: %(message)s", level=logging.INFO if log_requests else
                        logging.WARNING)  # fmt: skip
    gate, pool = Gate(), Pool(servers, timeout, options=connection)
    settings = Settings(
        keys.KeyRing(found, limits), int(max_body_mb * MEGABYTE), tuple(cors_origin or ()),
        public_url, int(files_mb * MEGABYTE), files_seconds, not no_page,
    )  # fmt: skip
    run(
        create_app(pool, settings, gate), gate, pool, drain_seconds, host=host, port=port,
        ssl_certfile=ssl_certfile, ssl_keyfile=ssl_keyfile,
        log_level="info" if log_requests else "warning",
    )  # fmt: skip


@app.command("hash-key")
def hash_key(
    name: Annotated[str, typer.Argument(help="The key's name, for logs.")],
    stdin: Annotated[
        bool, typer.Option("--stdin", help="Read the key from standard input; else make one.")
    ] = False,
) -> None:
    """Prints a key's entry for --keys-file; a key that is made goes to standard error, once."""
    if not keys.NAME.fullmatch(name):
        raise _refused(f"{name!r} is no name for a key: letters, digits, - and _ make one")
    key = sys.stdin.readline().strip() if stdin else keys.new_key()
    try:
        keys.check_length(key, "the key")
    except keys.KeyFileError as error:
        raise _refused(str(error)) from None
    if not stdin:
        typer.echo(f"key: {key}", err=True)
    typer.echo(f'[{name}]\nsha256 = "{keys.digest(key)}"')


def _connection(access: Access) -> dict[str, Any]:
    """Options of the servers' `Connection`; their files are read once.

    Raises:
        ValueError: an option or a file is wrong.
    """
    connection = Connection(**access.connection())
    try:
        credentials = connection.channel_credentials()
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from None
    return {"credentials": credentials, "headers": connection.headers}


def _check_finite(options: Mapping[str, Any]) -> None:
    """Raises ValueError where an option is infinite: clocks and counts end before."""
    for name, value in options.items():
        if value == math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be a finite number")


def _check_certificate(certificate: Path | None, key: Path | None) -> None:
    """Raises ValueError where HTTPS would not start."""
    if certificate is None:
        if key is not None:
            raise ValueError("--ssl-keyfile needs --ssl-certfile")
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as error:  # of the files, or of what is in them
        files = f"--ssl-certfile {certificate}" + (f", --ssl-keyfile {key}" if key else "")
        raise ValueError(f"{files}: {error.strerror or error}") from None


def _check_urls(origins: Iterable[str], public_url: str | None) -> None:
    """Raises ValueError where no browser would name such an origin, or no client find the URL."""
    for origin in origins:
        if not ORIGIN.fullmatch(origin):
            allowed = "such as https://app.example, without a path, or *"
            raise ValueError(f"--cors-origin {origin} must be an origin {allowed}")
    if public_url is not None and not ADDRESS.fullmatch(public_url):
        raise ValueError(f"--public-url {public_url} must be a URL such as https://paint.example")


def _refused(text: str) -> typer.Exit:
    typer.echo(f"gateway: {text}", err=True)
    return typer.Exit(2)


if __name__ == "__main__":
    app(prog_name="python -m gateway")
