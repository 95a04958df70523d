"""Where pictures are written: names that are free, the bytes as they came, and grids."""

from __future__ import annotations

import math
import re
from pathlib import Path

from PIL import Image

from twinbrush_client.errors import invalid
from twinbrush_client.wire import IMAGE_FORMATS

SUFFIXES = {"jpg": "jpeg"}


class Output:
    """Files of a command: one named file, or names made of prompts in a folder.

    Args:
        folder: where names are made.
        file: the picture's own name, or None; several pictures get their seeds added to it.
        overwrite: whether a file that exists is replaced.

    Raises:
        InvalidRequest: `file` exists, and would be overwritten.
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path, file: Path | None, overwrite: bool):
        self._folder = file.parent if file else folder
        self._file, self._overwrite = file, overwrite
        if file:
            refuse_existing("output", file, overwrite)
        self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, data: bytes, prompt: str, seed: int, image_format: str, several: bool) -> Path:
        """Writes a picture's bytes and returns its path.

        Raises:
            OSError: it cannot be written, or has been made meanwhile.
        """
        if self._file is None:
            path = self._folder / f"{slug(prompt)}-{seed}.{image_format}"
        elif several:
            path = self._file.with_stem(f"{self._file.stem}-{seed}")
        else:
            path = self._file
        if self._overwrite:
            path.write_bytes(data)
            return path
        return self._write_new(path, data)

    @staticmethod
    def _write_new(path: Path, data: bytes) -> Path:
        """Under the first free name of `a.png`, `a-2.png`, …"""
        stem, number = path.stem, 1
        while True:
            try:
                with path.open("xb") as file:
                    file.write(data)
            except FileExistsError:
                number += 1
                path = path.with_stem(f"{stem}-{number}")
            else:
                return path


def refuse_existing(option: str, path: Path, overwrite: bool) -> None:
    """Raises InvalidRequest where a file would be overwritten."""
    if path.exists() and not overwrite:
        raise invalid(f"--{option}", str(path), "exists; --overwrite replaces it")


def format_of(path: Path | None, wanted: str | None) -> str | None:
    """The image format that a file's suffix names, or the one that is wanted without a file.

    Raises:
        InvalidRequest: the suffix names none, or another one than is wanted.
    """
    if path is None:
        return wanted
    suffix = path.suffix.lower().removeprefix(".")
    name = SUFFIXES.get(suffix, suffix)
    if name not in IMAGE_FORMATS:
        raise invalid("--output", str(path), f"must end in one of {', '.join(IMAGE_FORMATS)}")
    if wanted not in (None, name):
        raise invalid("--format", wanted, f"must be {name}, as the suffix of --output says")
    return name


def grid(images: list[Image.Image]) -> Image.Image:
    """The pictures in rows, as near to a square as their number allows."""
    columns = math.ceil(math.sqrt(len(images)))
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet


def slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-") or "image"
