"""Which requests may call the networks: those that carry the launcher's key.

The launcher puts a random key into the environment of the server's Python stubs. The engine sends
it as a parameter of each call, and the Python `onnxruntime` backend refuses calls without it, so
that clients reach the two front doors only. Without the variable every call is allowed.
"""

from __future__ import annotations

import hmac
import json
import os

VARIABLE = "TWINBRUSH_NETWORK_KEY"
PARAMETER = "twinbrush_key"
REFUSAL = "clients cannot call this model: call text_to_image or text_to_image_stream"


def parameters() -> dict[str, str] | None:
    """Parameters for a call of a network, or None where no key is needed."""
    key = os.environ.get(VARIABLE)
    return {PARAMETER: key} if key else None


def is_open(parameters: str) -> bool:
    """Whether a request with these parameters, as JSON, may call a network."""
    key = os.environ.get(VARIABLE)
    if not key:
        return True
    given = json.loads(parameters or "{}").get(PARAMETER)
    return isinstance(given, str) and given.isascii() and hmac.compare_digest(given, key)
