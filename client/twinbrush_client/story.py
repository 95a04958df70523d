"""Reads back what a picture's file says of how it was made. Knows no server."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from twinbrush_client.errors import invalid
from twinbrush_client.fields import DATA_TYPES
from twinbrush_client.wire import IMAGE_FORMATS, typed

FORMATS = tuple(name.upper() for name in IMAGE_FORMATS)  # PIL's names


def read_story(file: Path | IO[bytes]) -> dict[str, Any]:
    """The settings in a file of Twinbrush's; of another tool's, A1111's text as `parameters`.

    Pixels are not decoded.

    Raises:
        InvalidRequest: the file is no picture, is damaged, or says nothing.
        OSError: the file cannot be read.
    """
    settings, text = read_texts(file)
    try:
        story = json.loads(settings) if settings else None
    except (ValueError, RecursionError):
        story = None
    if isinstance(story, dict):
        return {name: _shortest(name, value) for name, value in story.items()}
    if text:
        return {"parameters": text}
    raise invalid("file", _name(file), "says nothing of how it was made")


def read_texts(file: Path | IO[bytes]) -> tuple[str, str]:
    """Twinbrush's JSON and A1111's text in a file; each is empty where there is none.

    Raises:
        InvalidRequest: the file is no picture, or is damaged.
        OSError: the file cannot be read.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file, formats=FORMATS) as image:
            return texts_of(image)
    except UnidentifiedImageError:
        allowed = f"is no picture; {', '.join(IMAGE_FORMATS)} can be read"
        raise invalid("file", _name(file), allowed) from None
    except Exception as error:  # decoders raise any kind for bytes that they do not expect
        if isinstance(error, OSError) and error.errno is not None:
            raise
        allowed = "is a damaged picture, or one that is too large"
        raise invalid("file", _name(file), allowed) from None


def fields_of(story: dict[str, Any], file: str = "picture") -> dict[str, Any]:
    """The request fields of a story; sending them again paints the picture again.

    Args:
        file: whose story it is, for errors.

    Raises:
        InvalidRequest: the story has no prompt, or a value has the wrong type.
    """
    if not isinstance(story.get("prompt"), str):
        raise invalid("file", file, "was not made by Twinbrush, so it cannot be repeated")
    return {name: typed(name, value) for name, value in story.items() if name in DATA_TYPES}


def _name(file: Path | IO[bytes]) -> str:
    return str(file) if isinstance(file, Path) else "picture"


def _shortest(name: str, value: Any) -> Any:
    """A number of 32 bits as it was written: 0.3 and not 0.30000001192092896."""
    if DATA_TYPES.get(name) == "FP32" and isinstance(value, float):
        return float(str(np.float32(value)))
    return value


def texts_of(image: Image.Image) -> tuple[str, str]:
    """As `read_texts`, of an opened picture: from PNG's chunks or from EXIF."""
    settings, text = image.info.get("twinbrush"), image.info.get("parameters")
    if settings or text:
        return str(settings or ""), str(text or "")
    exif = image.getexif().get_ifd(ExifTags.IFD.Exif)
    tags = ExifTags.Base.MakerNote, ExifTags.Base.UserComment
    # Other programs may write numbers or text there.
    note, comment = (v if isinstance(v := exif.get(tag), bytes) else b"" for tag in tags)
    return note.decode("utf-8", "replace"), _comment(comment[:8], comment[8:])


def _comment(code: bytes, text: bytes) -> str:
    """EXIF's UserComment: A1111 writes UTF-16 from the high byte, others from the low, or ASCII."""
    if code == b"ASCII\0\0\0":
        return text.decode("ascii", "replace")
    if code[:7] != b"UNICODE":
        return ""
    low_first = text[::2].count(0) < text[1::2].count(0)  # most characters are below 256
    return text.decode("utf-16-le" if low_first else "utf-16-be", "replace")
