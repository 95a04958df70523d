"""Shows pictures in terminals: kitty's and iTerm's protocols, sixel, or half blocks elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image
from rich.color import Color
from rich.style import Style
from rich.text import Text

COLUMNS = 32  # of the terminal that a picture takes
CHUNK = 4096  # bytes of base64 in one of kitty's messages
SIXEL_COLOURS = 64
SIXEL_SIDE = 256  # pixels


def protocol(environment: Mapping[str, str]) -> Callable[[Image.Image], str] | None:
    """How this terminal takes pictures, by its environment; None where it takes none."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if "KITTY_WINDOW_ID" in environment or term == "xterm-kitty" or program == "ghostty":
        return kitty
    if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
        return iterm
    if "sixel" in term or term.startswith(("foot", "mlterm")):
        return sixel
    return None


def kitty(image: Image.Image) -> str:
    """https://sw.kovidgoyal.net/kitty/graphics-protocol"""
    data = _png(image)
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    messages = []
    for number, chunk in enumerate(chunks):
        control = f"a=T,f=100,c={COLUMNS}," if number == 0 else ""
        more = int(number < len(chunks) - 1)
        messages.append(f"\x1b_G{control}m={more};{chunk}\x1b\\")
    return "".join(messages)


def iterm(image: Image.Image) -> str:
    """https://iterm2.com/documentation-images.html"""
    return f"\x1b]1337;File=inline=1;width={COLUMNS}:{_png(image)}\x07"


def sixel(image: Image.Image) -> str:
    """DEC's sixel: bands of six rows, for each colour a character a column."""
    scale = max(1, SIXEL_SIDE // max(image.size))
    small = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    small.thumbnail((SIXEL_SIDE, SIXEL_SIDE))
    indexed = small.convert("RGB").quantize(SIXEL_COLOURS)
    palette = indexed.getpalette() or []
    pixels = indexed.tobytes()
    used = sorted(set(pixels))
    parts = [f'\x1bPq"1;1;{indexed.width};{indexed.height}']
    for index in used:
        red, green, blue = (round(v / 2.55) for v in palette[3 * index : 3 * index + 3])
        parts.append(f"#{index};2;{red};{green};{blue}")
    for top in range(0, indexed.height, 6):
        rows = [
            pixels[y * indexed.width : (y + 1) * indexed.width]
            for y in range(top, min(top + 6, indexed.height))
        ]
        lines = (_sixel_line(rows, index) for index in used)
        parts.append("$".join(line for line in lines if line) + "-")
    return "".join(parts) + "\x1b\\"


def _sixel_line(rows: list[bytes], index: int) -> str:
    if not any(index in row for row in rows):
        return ""
    bits = (sum((row[x] == index) << y for y, row in enumerate(rows)) for x in range(len(rows[0])))
    return f"#{index}" + "".join(chr(63 + bit) for bit in bits)


def half_blocks(image: Image.Image) -> Text:
    """Two pixels a character: the upper in its colour, the lower in its background."""
    width = min(COLUMNS, max(8, image.width))
    height = 2 * max(1, round(width * image.height / image.width / 2))
    small = image.convert("RGB").resize((width, height))
    text = Text(no_wrap=True)
    for y in range(0, height, 2):
        for x in range(width):
            upper, lower = small.getpixel((x, y)), small.getpixel((x, y + 1))
            text.append("▀", Style(color=_colour(upper), bgcolor=_colour(lower)))
        text.append("\n")
    return text


def _colour(pixel: Any) -> Color:
    return Color.from_rgb(*pixel)


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()
