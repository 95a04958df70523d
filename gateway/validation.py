"""What pydantic finds wrong in a body becomes an `ApiError` that names the field."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from annotated_types import Ge, Le
from pydantic.fields import FieldInfo

from gateway.errors import ApiError, invalid, shown, unknown

OUT_OF_RANGE = ("greater_than_equal", "less_than_equal")
WRONG_TYPE = ("_type", "_parsing", "_unicode")
FORMS = {"size": "must be WIDTHxHEIGHT in pixels, such as 512x512, or auto"}  # of patterns


def error_of(
    problems: Sequence[Mapping[str, Any]], body: object, fields: Mapping[str, FieldInfo]
) -> ApiError:
    """The first problem, an unknown field before others: it is often a misspelt one.

    Args:
        fields: of the body, for their ranges.
    """
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    kind, place = problem["type"], problem["loc"]
    if kind == "json_invalid":
        text = f"The body is not valid JSON: {problem['ctx']['error']} at character {place[-1]}."
        return ApiError(400, text, code="invalid_json")
    names = [str(part) for part in place[1:]]
    if not names:
        if not isinstance(body, dict):
            text = "The body must be a JSON object, sent with content-type: application/json."
            return ApiError(400, text, code="invalid_body")
        return ApiError(400, problem["msg"], code="invalid_value")
    param, value = names[0], problem["input"]
    if kind == "extra_forbidden":
        return unknown(param)
    if kind == "missing":
        text = f"Missing required parameter: {param!r}."
        return ApiError(400, text, param=param, code="missing_required_parameter")
    if kind.endswith(WRONG_TYPE):
        text = f"Invalid type for {param!r}: {problem['msg']}; got {shown(value)}."
        return ApiError(400, text, param=param, code="invalid_type")
    if kind == "string_pattern_mismatch":
        return invalid(param, value, FORMS[param])
    if kind in OUT_OF_RANGE:
        return invalid(param, value, _range(fields[param]))
    return invalid(param, value, _lowered(problem["msg"]))


def _range(field: FieldInfo) -> str:
    low = next(each.ge for each in field.metadata if isinstance(each, Ge))
    high = next(each.le for each in field.metadata if isinstance(each, Le))
    return f"must be between {low} and {high}"


def _lowered(message: str) -> str:
    """Pydantic's sentence in the middle of another one, in our words."""
    message = re.sub(r"^(Input|String) should", "must", message)
    return message[:1].lower() + message[1:]
