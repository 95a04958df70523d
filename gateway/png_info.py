"""A1111's `png-info`: what a picture's file says of how it was made. Knows no routes."""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from typing import Any

from gateway.errors import invalid
from twinbrush_client import InvalidRequest
from twinbrush_client.story import read_texts

DATA_URL = re.compile(r"data:[^,]{0,100};base64,")
SIZE = re.compile(r"(\d+)x(\d+)")
NEGATIVE = "Negative prompt:"
# `Label: value` of the last line; a value with a comma or a colon is a string of JSON.
# Nothing in it goes back, and pairs follow each other, so that no text takes long.
PAIR = re.compile(r'\s*+([^:,"]++):\s*+("(?:[^"\\]|\\.)*+"|[^,]*+)(?:,|$)')


def png_info(text: str) -> dict[str, Any]:
    """The answer to a picture in base64, or in a data URL.

    Raises:
        ApiError: it is no picture.
    """
    try:
        settings, infotext = read_texts(io.BytesIO(_decoded(text)))
    except InvalidRequest:
        allowed = "must be a picture's file (png, jpeg, webp, avif) in base64"
        raise invalid("image", text, allowed) from None
    items = {"twinbrush": settings} if settings else {}
    return {"info": infotext, "items": items, "parameters": parameters(infotext)}


def parameters(infotext: str) -> dict[str, str]:
    """A1111's text as its parts: `Prompt`, `Negative prompt`, `Steps`, …, `Size-1`, `Size-2`."""
    lines = infotext.splitlines()
    if not lines:
        return {}
    last = lines.pop() if PAIR.match(lines[-1]) and "Steps:" in lines[-1] else ""
    text, _, negative = "\n".join(lines).partition(NEGATIVE)
    found = {"Prompt": text.strip(), "Negative prompt": negative.strip()}
    place = 0
    while pair := PAIR.match(last, place):
        found[pair[1].strip()] = _unquoted(pair[2].strip())
        place = pair.end()
    if size := SIZE.fullmatch(found.pop("Size", "")):
        found |= {"Size-1": size[1], "Size-2": size[2]}
    return found


def _decoded(text: str) -> bytes:
    url = DATA_URL.match(text)
    try:
        return base64.b64decode(text[url.end() :] if url else text)
    except (binascii.Error, ValueError):
        return b""


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value
