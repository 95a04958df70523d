"""Command-line options that commands share: of the request fields, and of the way to a server."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from twinbrush_client.client import Client
from twinbrush_client.connection import DEFAULT_ADDRESS
from twinbrush_client.errors import invalid, shown
from twinbrush_client.fields import ALLOWED, COUNTS, DATA_TYPES, HELP, STREAM_ONLY

TYPES = {"BYTES": str, "INT64": int, "INT32": int, "FP32": float, "BOOL": bool}
SHORT = {"num_images": "-n", "guidance_scale": "-g"}
OTHERWISE = {"prompt", "image_format", *STREAM_ONLY}  # fields that a command takes in its own way

# What a value must be, of Typer's kinds of faults; else its own words are as good.
MUST_BE = {"int_parsing": "an integer", "float_parsing": "a number"}

API_KEY = "TWINBRUSH_API_KEY"
PANEL = "Way to the server"  # of the help


class Command(TyperCommand):
    """A command whose errors of options have the value and what is allowed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            raise _with_value(error) from None


class Group(TyperGroup):
    """As `Command`, of options in front of commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            raise _with_value(error) from None


def _with_value(error: typer.BadParameter) -> typer.BadParameter:
    """Typer names the option alone; the value is in its cause."""
    problems = getattr(error.__cause__, "errors", list)()
    if problems:
        kind, value = problems[0]["type"], problems[0]["input"]
        allowed = MUST_BE.get(kind) or problems[0]["msg"].removeprefix("Input should be ")
        field = ALLOWED.get(getattr(error.param, "name", None) or "")
        error.message = f"{shown(value)} must be {allowed}" + (f", {field}" if field else "")
    return error


@dataclass(frozen=True)
class Access:
    """What servers ask of who calls them; the options of the same names, with their help."""

    tls: Annotated[
        bool,
        typer.Option("--tls", help="Use TLS, with the public authorities or those of --ca.",
                     rich_help_panel=PANEL),
    ] = False  # fmt: skip
    ca: Annotated[
        Path | None,
        typer.Option(help="PEM file of the authorities to trust; turns TLS on.",
                     rich_help_panel=PANEL),
    ] = None  # fmt: skip
    cert: Annotated[
        Path | None,
        typer.Option(help="PEM file of the client's certificate, for servers that ask for one.",
                     rich_help_panel=PANEL),
    ] = None  # fmt: skip
    key: Annotated[
        Path | None, typer.Option(help="PEM file of its private key.", rich_help_panel=PANEL)
    ] = None  # fmt: skip
    header: Annotated[
        list[str] | None,
        typer.Option(help=f"NAME:VALUE to send with each call; repeatable. {API_KEY} of the "
                     "environment becomes `authorization: Bearer KEY`.", metavar="NAME:VALUE",
                     rich_help_panel=PANEL),
    ] = None  # fmt: skip

    def connection(self) -> dict[str, Any]:
        """Options of a `Connection`. Raises InvalidRequest where one is wrong."""
        return {"tls": self.ca or self.tls, "cert": self.cert, "key": self.key,
                "headers": self._headers()}  # fmt: skip

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(API_KEY, "").strip()
        headers = {"authorization": f"Bearer {key}"} if key else {}
        for text in self.header or ():
            name, colon, value = text.partition(":")
            if not colon:
                raise invalid("--header", name, "must be NAME:VALUE")
            headers[name.strip().lower()] = value.strip()
        return headers


@dataclass(frozen=True)
class Way(Access):
    """How a command reaches its server."""

    server: Annotated[
        str,
        typer.Option(envvar="TWINBRUSH_SERVER", help="Server's gRPC address.",
                     rich_help_panel=PANEL),
    ] = DEFAULT_ADDRESS  # fmt: skip

    def client(self, timeout: float, **options: Any) -> Client:
        """A client of the server.

        Raises:
            InvalidRequest: an option is wrong.
            OSError: a file cannot be read.
        """
        return Client(self.server, timeout, **options, **self.connection())


def with_server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the options of `Way`, which reach it as its keyword `way`."""
    return with_options_of(Way, "way", command)


def with_options_of(
    kind: type[Access], name: str, command: Callable[..., Any]
) -> Callable[..., Any]:
    """Gives a command the options of a kind of `Access`, which reach it as one keyword."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name != name]
    hints = get_type_hints(kind, include_extras=True)
    options = [
        inspect.Parameter(
            each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default,
            annotation=hints[each.name],
        )
        for each in sorted(fields(kind), key=lambda each: each.name != "server")
    ]  # fmt: skip

    def run(**values: Any) -> None:
        access = kind(**{each.name: values.pop(each.name) for each in fields(kind)})
        command(**values, **{name: access})

    return _of_signature(run, command, [*own, *options])


def with_field_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command an option for each field; they reach it as keywords, None where absent."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [_option(name) for name in DATA_TYPES if name not in OTHERWISE]
    return _of_signature(command, command, [*own, *options])


def _of_signature(
    run: Callable[..., Any], command: Callable[..., Any], parameters: Sequence[inspect.Parameter]
) -> Callable[..., Any]:
    """`run` with the name and help of a command, and keywords of these parameters."""
    keywords = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    vars(run)["__signature__"] = inspect.Signature(keywords)
    run.__annotations__ = {p.name: p.annotation for p in keywords} | {"return": None}
    return run


def _option(name: str) -> inspect.Parameter:
    kind, flag = TYPES[DATA_TYPES[name]], "--" + name.replace("_", "-")
    if name in COUNTS:
        kind = tuple[(kind,) * COUNTS[name]]
    names = [SHORT[name], flag] if name in SHORT else [flag]
    text = HELP[name] if kind is bool else f"{HELP[name]} Allowed: {ALLOWED[name]}."
    annotation = Annotated[kind | None, typer.Option(*([] if kind is bool else names), help=text)]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )
