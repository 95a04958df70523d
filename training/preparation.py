"""From a row of captioned data to what is trained on: filters, captions, pictures.

Everything that leaves a row out raises `LeftOut` with a reason that is counted. Knows nothing
of file formats; `captioned` reads those.
"""

from __future__ import annotations

import html
import io
import operator
import re
import struct
import time
import unicodedata
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import urllib3
from PIL import Image, ImageOps

from training.data import BadInput

Row = dict[str, Any]
CROPS = ("center", "random")
MAX_PIXELS = 100_000_000  # of a picture before it is made small; more is taken for a bomb
# What pillow's plugins raise for files that are not what they say.
BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, RuntimeError, struct.error,
    zlib.error, Image.DecompressionBombError,
)  # fmt: skip
_OPERATORS = {">=": operator.ge, "<=": operator.le}
_TAG = re.compile(r"<[^<>]*>")
_URL = re.compile(r"\b(?:https?://|www\.)\S+", re.IGNORECASE)


class LeftOut(Exception):
    """A row is not used; the message is its reason, short and countable."""


@dataclass(frozen=True)
class Bound:
    """A row is kept where `column` holds a number on the right side of `value`."""

    column: str
    sign: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Bound:
        """From `column>=number` or `column<=number`.

        Raises:
            BadInput: for anything else.
        """
        matched = re.fullmatch(r"\s*(\w+)\s*(>=|<=)\s*(-?\d+(?:\.\d+)?)\s*", text)
        if not matched:
            raise BadInput(f"--keep: {text!r} is not COLUMN>=NUMBER or COLUMN<=NUMBER")
        return cls(matched[1], matched[2], float(matched[3]))

    def __str__(self) -> str:
        return f"{self.column}{self.sign}{self.value:g}"

    def holds(self, row: Row) -> bool:
        """Whether the row is kept: not where its value is empty; yes where the column is absent."""
        if self.column not in row:
            return True
        try:
            return bool(_OPERATORS[self.sign](float(row[self.column]), self.value))
        except (TypeError, ValueError):
            return False


# Of COYO-700M's columns. LAION-5B kept English pairs from a ViT-B/32 similarity of 0.28
# (arXiv:2210.08402, 3.1); the others leave out the tail of each column.
BOUNDS = tuple(
    Bound.parse(text)
    for text in (
        "clip_similarity_vitb32>=0.28",
        "clip_similarity_vitl14>=0.2",
        "aesthetic_score_laion_v2>=4.5",
        "watermark_score<=0.5",
        "nsfw_score_opennsfw2<=0.5",
    )
)


OF_LOADING = ("timeout", "deadline", "fetchers")  # say how pictures are fetched, not which


@dataclass(frozen=True)
class Preparation:
    """How rows become training data.

    Attributes:
        side: of the pictures, in pixels; smaller ones are left out.
        crop: of `CROPS`, which square of a picture is taken.
        bounds: what a row's columns must satisfy.
        max_aspect: the long side over the short one, at most.
        min_caption, max_caption: characters; longer captions are cut at a word.
        timeout: seconds until a server must answer, and between two of its answers.
        deadline: seconds for a whole download.
        max_bytes: of a picture's file.
        fetchers: pictures read or downloaded at a time.

    Raises:
        BadInput: a side that is no multiple of 16, an unknown crop, bad caption lengths.
    """

    side: int = 64
    crop: str = "center"
    bounds: tuple[Bound, ...] = BOUNDS
    max_aspect: float = 3.0
    min_caption: int = 3
    max_caption: int = 300
    timeout: float = 10.0
    deadline: float = 30.0
    max_bytes: int = 20_000_000
    fetchers: int = 16

    def __post_init__(self) -> None:
        if self.side < 32 or self.side % 16:
            raise BadInput(f"--side: {self.side} is not a multiple of 16 from 32")
        if self.crop not in CROPS:
            raise BadInput(f"--crop: {self.crop!r} is not one of {', '.join(CROPS)}")
        if not 1 <= self.min_caption <= self.max_caption:
            raise BadInput(
                f"--min-caption: {self.min_caption} is not from 1 to"
                f" --max-caption, which is {self.max_caption}"
            )

    def caption(self, row: Row) -> str:
        """The clean caption of a row whose columns pass.

        Raises:
            LeftOut: by a bound, the size in its columns, or for too short a caption.
        """
        for bound in self.bounds:
            if not bound.holds(row):
                raise LeftOut(str(bound))
        if row.get("width") and row.get("height"):
            try:
                size = int(float(row["width"])), int(float(row["height"]))
            except (TypeError, ValueError, OverflowError):
                raise LeftOut("size")
            self.check_size(*size)
        caption = clean_caption(str(row["text"] or ""), self.max_caption)
        if len(caption) < self.min_caption:
            raise LeftOut("caption")
        return caption

    def check_size(self, width: int, height: int) -> None:
        if min(width, height) < self.side:
            raise LeftOut("small")
        if max(width, height) > self.max_aspect * min(width, height):
            raise LeftOut("aspect")

    def picture(self, encoded: bytes, rng: np.random.Generator) -> np.ndarray:
        """The square that is trained on: uint8 (side, side, 3).

        Raises:
            LeftOut: a file that is broken, of too many pixels, or of a size that is not taken.
        """
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise LeftOut("too large")
                self.check_size(*image.size)
                image.draft(
                    "RGB", (self.side, self.side)
                )  # JPEG: decodes at a fraction of the size
                square = self._square(_opaque(ImageOps.exif_transpose(image)), rng)
        except BROKEN:
            raise LeftOut("broken")
        return np.asarray(square)

    def _square(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        short = min(image.size)
        room = (image.width - short, image.height - short)
        left, top = room[0] // 2, room[1] // 2
        if self.crop == "random":
            left, top = (int(rng.integers(n + 1)) for n in room)
        box = (left, top, left + short, top + short)
        return image.resize((self.side, self.side), Image.Resampling.BICUBIC, box, reducing_gap=3)


def clean_caption(text: str, longest: int) -> str:
    """Text without markup, addresses and control characters, its spaces single.

    Longer than `longest` characters it is cut, after a word where it has one.
    """
    for _ in range(2):  # "&amp;lt;" is common in text from the web
        text = html.unescape(text)
    text = _URL.sub(" ", _TAG.sub(" ", text))
    text = unicodedata.normalize("NFC", text)
    text = "".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in text)
    text = " ".join(text.split())
    if len(text) <= longest:
        return text
    return text[: longest + 1].rpartition(" ")[0] or text[:longest]


def _opaque(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layers = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")


class Fetcher:
    """Reads the bytes of pictures: from memory, files, or the web, within a preparation's limits.

    Safe to call from many threads.
    """

    def __init__(self, preparation: Preparation):
        self._limits = preparation
        self._web = urllib3.PoolManager(
            num_pools=100,
            maxsize=preparation.fetchers,
            headers={"User-Agent": "twinbrush-training"},
            timeout=urllib3.Timeout(connect=preparation.timeout, read=preparation.timeout),
            retries=urllib3.Retry(total=None, connect=1, read=0, redirect=3, status=0, other=0),
        )

    def read(self, picture: bytes | str | Path | None) -> bytes:
        """The encoded bytes of a picture: given itself, by path, or by address.

        Raises:
            LeftOut: `missing`, `unreachable` or `too large`.
        """
        if not picture:
            raise LeftOut("missing")
        if isinstance(picture, bytes):
            return self._bounded(picture)
        if isinstance(picture, Path):
            try:
                if picture.stat().st_size > self._limits.max_bytes:
                    raise LeftOut("too large")
                return picture.read_bytes()
            except OSError:
                raise LeftOut("missing")
        if not picture.startswith(("http://", "https://")):
            raise LeftOut("unreachable")
        try:
            return self._download(picture)
        except (urllib3.exceptions.HTTPError, UnicodeError, ValueError):
            raise LeftOut("unreachable")

    def _download(self, url: str) -> bytes:
        until = time.monotonic() + self._limits.deadline
        answer = self._web.request("GET", url, preload_content=False)
        try:
            if answer.status != 200:
                raise LeftOut("missing" if answer.status in (404, 410) else "unreachable")
            if int(answer.headers.get("Content-Length", 0)) > self._limits.max_bytes:
                raise LeftOut("too large")
            body = bytearray()
            while chunk := answer.read1(65_536):  # what has come, so that drips meet the deadline
                body += chunk
                if len(body) > self._limits.max_bytes:
                    raise LeftOut("too large")
                if time.monotonic() > until:
                    raise LeftOut("unreachable")
            answer.release_conn()
            return bytes(body)
        finally:
            answer.close()

    def _bounded(self, encoded: bytes) -> bytes:
        if len(encoded) > self._limits.max_bytes:
            raise LeftOut("too large")
        return encoded
