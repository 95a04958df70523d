"""Command-line options of the request fields, from the table that the server gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from twinbrush_client.fields import ALLOWED, COUNTS, DATA_TYPES, HELP, STREAM_ONLY

TYPES = {"BYTES": str, "INT64": int, "INT32": int, "FP32": float, "BOOL": bool}
SHORT = {"num_images": "-n", "guidance_scale": "-g"}
OTHERWISE = {"prompt", "image_format", *STREAM_ONLY}  # fields that a command takes in its own way


def with_field_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command an option for each field; they reach it as keywords, None where absent."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [_option(name) for name in DATA_TYPES if name not in OTHERWISE]
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*own, *options)]
    vars(command)["__signature__"] = signature.replace(parameters=parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return command


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
