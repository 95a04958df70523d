"""Fields of a network's configuration, held against what its class declares of them.

Libraries take most wrong values without a word, or fail in the middle of a network. Knows no class
and no checkpoint.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from networks.loading import CheckpointError

SHOWN = 60  # characters of a value in a message
ELSEWHERE = ("sample_size",)  # may be more than its class declares: see `export.sizes`
ID = "_id"  # end of the names of token ids, which may be 0
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def check_fields(file: Path, config: Mapping[str, Any], made_of: type) -> None:
    """Checks the kind and sign of every field that a class knows.

    Args:
        file: for messages.
        config: its content.
        made_of: the class whose constructor takes the fields.

    Raises:
        CheckpointError: it names file, field and value, and what is allowed.
    """
    for name, parameter in inspect.signature(made_of.__init__).parameters.items():
        if name not in config or name in ELSEWHERE or name.endswith(ID):
            continue
        kinds = set(_kinds(parameter.annotation))
        value, default = config[name], parameter.default
        if not kinds <= {*KINDS, NoneType, list, tuple} or (value is None and default is None):
            continue
        positive = _is_positive(default) or (default is None and float not in kinds)
        if not _fits(value, kinds, positive):
            allowed = _words(kinds, positive)
            raise CheckpointError(f"{file}: {name}={shown(value)} is invalid: must be {allowed}")


def shown(value: object) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _kinds(hint: Any) -> Iterator[Any]:
    """The types of a hint, and `list` where it has lists; those inside a list stand beside it."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        for part in get_args(hint):
            yield from _kinds(part)
    elif hint in (list, tuple) or origin in (list, tuple):
        yield list
        for part in get_args(hint):
            if part is not Ellipsis:
                yield from _kinds(part)
    else:
        yield hint


def _is_positive(default: Any) -> bool:
    """Whether numbers must be above 0, as those are that a class has by itself."""
    if isinstance(default, (tuple, list)):
        return all(map(_is_positive, default))
    return isinstance(default, (int, float)) and default > 0


def _fits(value: Any, kinds: set[Any], positive: bool) -> bool:
    if isinstance(value, list):
        inner = kinds - {NoneType}
        return list in kinds and value != [] and all(_fits(v, inner, positive) for v in value)
    if value is None:
        return NoneType in kinds or bool in kinds  # published files have null for false
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int | float) and (float in kinds or (int in kinds and type(value) is int)):
        return math.isfinite(value) and (value > 0 if positive else value >= 0 or float in kinds)
    return isinstance(value, str) and str in kinds


def _words(kinds: set[Any], positive: bool) -> str:
    """What is allowed."""
    sign = " above 0" if positive else ""
    words = [
        text + (sign if kind in (int, float) else "")
        for kind, text in KINDS.items()
        if kind in kinds and not (kind is int and float in kinds)
    ]
    text = " or ".join(words)
    return f"{text}, or a list of such" if list in kinds else text
