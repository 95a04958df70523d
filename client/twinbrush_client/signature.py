"""Gives methods that take request fields as keywords a signature that names each of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar

from twinbrush_client.fields import STREAM_ONLY, RequestFields

Method = TypeVar("Method", bound=Callable)


def with_fields(method: Method) -> Method:
    """For `help()` and notebooks; type checkers read `Unpack[RequestFields]`."""
    signature = inspect.signature(method)
    given = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    names = [
        name
        for name in RequestFields.__annotations__
        if name not in STREAM_ONLY or method.__name__ == "stream"
    ]
    keywords = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None,
            annotation=getattr(annotation, "__forward_arg__", annotation),
        )
        for name, annotation in RequestFields.__annotations__.items() if name in names
    ]  # fmt: skip
    vars(method)["__signature__"] = signature.replace(parameters=[*given, *keywords])
    return method
