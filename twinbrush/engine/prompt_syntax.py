r"""Prompt syntax: weights, escapes and breaks, as prompts for the A1111 web UI have them.

| written | read as |
|---|---|
| `(a)`, `((a))` | `a` with weight 1.1, 1.21 |
| `[a]` | `a` with weight 1/1.1 |
| `(a:1.3)` | `a` with weight 1.3; times the weights around it |
| `\(`, `\)`, `\[`, `\]`, `\\` | the character itself |
| `BREAK` | what follows starts a new chunk of tokens; also inside brackets |

A bracket that is never closed reaches to the end; one that was never opened is text, and so is a
colon without a number. Knows no tokens.
"""

from __future__ import annotations

import re

PLAIN, A1111 = "plain", "a1111"
SYNTAXES = (PLAIN, A1111)
ROUND, SQUARE = 1.1, 1 / 1.1  # weights of brackets
MAX_WEIGHT = 10.0  # of either sign; also what 24 nested brackets make
BREAK = re.compile(r"\s*\bBREAK\b\s*")
TOKEN = re.compile(
    r"""
    \\(?P<escaped>[()\[\]\\])
    | (?P<open>[(\[])
    | :\s*(?P<weight>[+-]?[.\d]+)\s*\)
    | (?P<close>[)\]])
    | [^\\()\[\]:]+
    | [\\:]
    """,
    re.VERBOSE,
)

Piece = tuple[str, float]  # text and its weight
Section = list[Piece]  # what stands between two breaks; pieces beside each other differ in weight


def parse(text: str) -> list[Section]:
    """The sections of a prompt, one more than it has breaks; none has an empty piece.

    Raises:
        ValueError: a weight is no number, or out of range; the message says which.
    """
    pieces: list[tuple[str | None, float]] = []  # None is a break
    opened: dict[str, list[int]] = {"(": [], "[": []}  # first piece inside each open bracket
    for match in TOKEN.finditer(text):
        written, weight = match[0], match["weight"]
        if bracket := match["open"]:
            opened[bracket].append(len(pieces))
        elif weight is not None and opened["("]:
            _multiply(pieces, opened["("].pop(), _number(weight))
        elif match["close"] == ")" and opened["("]:
            _multiply(pieces, opened["("].pop(), ROUND)
        elif match["close"] == "]" and opened["["]:
            _multiply(pieces, opened["["].pop(), SQUARE)
        elif match["escaped"]:
            pieces.append((match["escaped"], 1.0))
        else:
            first, *others = BREAK.split(written)
            pieces.append((first, 1.0))
            for other in others:
                pieces += [(None, 1.0), (other, 1.0)]
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        for start in opened[bracket]:
            _multiply(pieces, start, factor)
    return _sections(pieces)


def without_syntax(text: str) -> str:
    """The words of a prompt, for encoders that know no weights.

    Raises:
        ValueError: see `parse`.
    """
    return " ".join("".join(text for text, _ in section) for section in parse(text)).strip()


def has_syntax(text: str) -> bool:
    """Whether `parse` reads anything but the text itself."""
    try:
        return parse(text) != [[(text, 1.0)] if text else []]
    except ValueError:
        return True


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"its weight {text} must be a number") from None


def _multiply(pieces: list[tuple[str | None, float]], start: int, factor: float) -> None:
    for i in range(start, len(pieces)):
        text, weight = pieces[i]
        pieces[i] = text, weight * factor


def _sections(pieces: list[tuple[str | None, float]]) -> list[Section]:
    sections: list[Section] = [[]]
    for text, weight in pieces:
        section = sections[-1]
        if text is None:
            sections.append([])
        elif not text:
            continue
        elif section and section[-1][1] == weight:
            section[-1] = section[-1][0] + text, weight
        else:
            section.append((text, weight))
    for section in sections:
        for text, weight in section:
            if not abs(weight) <= MAX_WEIGHT:
                shown = text.strip()[:20]
                allowed = f"must be between -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}"
                raise ValueError(f"the weight of {shown!r} is {weight:.4g}, it {allowed}")
    return sections
