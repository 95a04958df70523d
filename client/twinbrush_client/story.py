"""Reads back what a picture's file says of how it was made. Knows no server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

from PIL import ExifTags, Image, UnidentifiedImageError

from twinbrush_client.errors import invalid
from twinbrush_client.fields import DATA_TYPES
from twinbrush_client.wire import checked


def read_story(file: Path | IO[bytes]) -> dict[str, Any]:
    """The settings in a file of Twinbrush's; of another tool's, A1111's text as `parameters`.

    Raises:
        InvalidRequest: the file is no picture, or says nothing.
        OSError: the file cannot be read.
    """
    name = str(file) if isinstance(file, Path) else "picture"
    try:
        with Image.open(file) as image:
            settings, text = _texts(image)
    except UnidentifiedImageError:
        raise invalid("file", name, "is no picture") from None
    except Exception as error:  # a damaged file may raise anything
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise invalid("file", name, "is damaged") from None
    try:
        story = json.loads(settings) if settings else None
    except ValueError:
        story = None
    if isinstance(story, dict):
        return story
    if text:
        return {"parameters": text}
    raise invalid("file", name, "says nothing of how it was made")


def fields_of(story: dict[str, Any]) -> dict[str, Any]:
    """The request fields of a story; sending them again paints the picture again.

    Raises:
        InvalidRequest: the story has no prompt, or a value of the wrong type.
    """
    if not isinstance(story.get("prompt"), str):
        raise invalid("file", "parameters", "was not made by Twinbrush, so it cannot be repeated")
    fields = {name: value for name, value in story.items() if name in DATA_TYPES}
    checked({name: value for name, value in fields.items() if name != "prompt"})
    return fields


def parameters_of(image: Image.Image) -> str:
    """A1111's text in a picture; empty where it has none."""
    return _texts(image)[1]


def _texts(image: Image.Image) -> tuple[str, str]:
    """Twinbrush's JSON and A1111's text, from PNG's chunks or from EXIF."""
    settings, text = image.info.get("twinbrush"), image.info.get("parameters")
    if settings or text:
        return str(settings or ""), str(text or "")
    exif = image.getexif().get_ifd(ExifTags.IFD.Exif)
    note, comment = (exif.get(tag, b"") for tag in (ExifTags.Base.MakerNote,
                                                    ExifTags.Base.UserComment))  # fmt: skip
    decoded = comment[8:].decode("utf-16-be", "replace") if comment[:7] == b"UNICODE" else ""
    return note.decode("utf-8", "replace"), decoded
