"""Where pictures are written: names that are free, the bytes as they came, and grids."""

from __future__ import annotations

import errno
import io
import math
import os
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
        OSError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, file: Path | None, overwrite: bool):
        self._folder, self._file, self._overwrite = folder, file, overwrite
        if file:
            new_file("output", file, overwrite)
        else:
            _make_folder(folder)

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
        return self._write(path, data)

    def write_grid(self, sheet: Image.Image, path: Path) -> Path:
        """Writes a grid in the format of its suffix and returns its path; raises as `write`."""
        file = io.BytesIO()
        sheet.save(file, format_of("grid", path))
        return self._write(path, file.getvalue())

    def _write(self, path: Path, data: bytes) -> Path:
        """Where nothing is overwritten, under the first free name of `a.png`, `a-2.png`, …"""
        if self._overwrite:
            path.write_bytes(data)
            return path
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


def new_file(option: str, path: Path, overwrite: bool) -> None:
    """Makes the folder of a file that will be written, before any work is done for it.

    Raises:
        InvalidRequest: the file exists, and would be overwritten.
        OSError: the folder cannot be made or written to.
    """
    if path.is_dir():
        raise invalid(f"--{option}", str(path), "is a folder")
    if path.exists() and not overwrite:
        raise invalid(f"--{option}", str(path), "exists; --overwrite replaces it")
    _make_folder(path.parent)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
    if not os.access(folder, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def format_of(option: str, path: Path | None, wanted: str | None = None) -> str | None:
    """The image format that a file's suffix names, or the one that is wanted without a file.

    Raises:
        InvalidRequest: the suffix names none, or another one than is wanted.
    """
    if path is None:
        return wanted
    suffix = path.suffix.lower().removeprefix(".")
    name = SUFFIXES.get(suffix, suffix)
    if name not in IMAGE_FORMATS:
        raise invalid(f"--{option}", str(path), f"must end in one of {', '.join(IMAGE_FORMATS)}")
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
