"""Where the networks run: `served` by Triton, or `in_process`, in the engine's own process.

The parameter `runtime` of the engine's `config.pbtxt` says it. The launcher decides once for both
sides and hands the engine its decision in the environment variable `TWINBRUSH_RUNTIME`. Knows
neither Triton nor ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

VARIABLE = "TWINBRUSH_RUNTIME"
PARAMETER = "runtime"


class Runtime(StrEnum):
    """Where the networks run."""

    SERVED = "served"
    IN_PROCESS = "in_process"


def configured_runtime(config: Mapping[str, Any]) -> Runtime:
    """By the parameter of a `config.pbtxt` in Triton's JSON form; without it, `SERVED`.

    Raises:
        ValueError: the parameter has another value.
    """
    entry = config.get("parameters", {}).get(PARAMETER)
    return Runtime.SERVED if entry is None else _parse(entry.get("string_value"), "config.pbtxt")


def chosen_runtime(config: Mapping[str, Any], environment: Mapping[str, str]) -> Runtime:
    """The launcher's decision, else the parameter.

    Raises:
        ValueError: that value is not allowed.
    """
    if value := environment.get(VARIABLE):
        return _parse(value, VARIABLE)
    return configured_runtime(config)


def _parse(value: str | None, source: str) -> Runtime:
    try:
        return Runtime(value or "")
    except ValueError:
        allowed = " or ".join(Runtime)
        raise ValueError(f"runtime={value!r} of {source} is invalid: must be {allowed}") from None
