"""What a request of Triton's brings: inputs and parameters, checked and copied.

Reads a request by its methods alone; knows no engine.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from twinbrush.engine.fields import InvalidArgument, shortened
from twinbrush.engine.request import check_sizes, unknown_input

TRACE_PARENT = "traceparent"  # a parameter, or a header that Triton lets through
TRACE_PARENT_FORM = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
MAX_PARAMETERS = 1 << 16  # bytes of a request's parameters, as JSON
# The parameter that Triton makes of a header which --grpc-header-forward-pattern lets through: a
# proxy's word on who asks.
CLIENT_HEADER = "twinbrush-client"


def read(request: Any, names: tuple[str, ...]) -> tuple[dict[str, np.ndarray], str]:
    """Copies of a request's inputs, and the client's span, in W3C's form, or "".

    Copies, because the server takes back its memory.

    Args:
        names: of the model's inputs.

    Raises:
        InvalidArgument: an input is unknown or too large, or the parameters are not as they must
            be. A member of a JSON body that is no input is a parameter of the request to Triton.
    """
    given = _parameters(request)
    client, parent = given.pop(CLIENT_HEADER, None), given.pop(TRACE_PARENT, "")
    for name, value in given.items():
        # Triton makes a parameter of a body's `id`, too.
        if name != "id" and not name.startswith("triton_"):
            raise unknown_input(name, value, names)
    tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
    check_sizes(tensors)
    fields = {name: tensor.copy() for name, tensor in tensors.items()}
    if client is not None:
        fields["client"] = np.array([str(client).encode("utf-8", "replace")], object)
        check_sizes({"client": fields["client"]})
    valid = isinstance(parent, str) and TRACE_PARENT_FORM.fullmatch(parent)
    return fields, parent if valid else ""


def _parameters(request: Any) -> dict[str, Any]:
    try:
        text = request.parameters() or "{}"
    except UnicodeDecodeError as error:
        allowed = f"must be UTF-8 text; byte {error.start} is not"
        raise InvalidArgument("parameters", error.object, allowed) from None
    if len(text) > MAX_PARAMETERS:
        allowed = f"must have at most {MAX_PARAMETERS} bytes; it has {len(text)}"
        raise InvalidArgument("parameters", shortened(text), allowed)
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise InvalidArgument("parameters", text, "must be a JSON object")
    return given
