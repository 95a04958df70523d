"""The world of `scenes-64`: pictures of coloured shapes that stand in relations.

A `Scene` is the structured truth; `render` draws it, `describe` words it in one of many
ways. Everything is a pure function of the generator that is passed in. This module knows
nothing of models.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

SIDE = 64  # pixels

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 137, 20),
    "yellow": (247, 224, 40),
    "green": (44, 160, 44),
    "cyan": (40, 205, 220),
    "blue": (31, 80, 200),
    "purple": (130, 60, 180),
    "pink": (250, 130, 190),
}
BACKGROUNDS = {
    "white": (248, 248, 248),
    "black": (12, 12, 12),
    "gray": (128, 128, 128),
    "brown": (110, 70, 40),
}
SIZES = {"small": 7.5, "large": 12.5}  # radius in pixels
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

ROWS = 0.25  # share of requests of three objects that are in a row or a column

# One in eight (shape, colour, size) combinations is kept out of training, so that a prompt
# about one of them asks for something never seen: twelve objects that are only ever large.
# Every shape and colour loses some.
HELD_OUT = frozenset(
    (shape, colour, "small")
    for i, shape in enumerate(SHAPES)
    for j, colour in enumerate(COLOURS)
    if (j + 3 * i) % 4 == 0
)


@dataclass(frozen=True)
class Item:
    """One object; `x` and `y` are its centre in pixels, y downwards."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def radius(self) -> float:
        return SIZES[self.size]

    @property
    def kind(self) -> tuple[str, str, str]:
        return (self.shape, self.colour, self.size)


@dataclass(frozen=True)
class Scene:
    items: tuple[Item, ...]
    background: str

    @property
    def held_out(self) -> bool:
        return any(item.kind in HELD_OUT for item in self.items)


def relation(a: Item, b: Item) -> str | None:
    """How `a` stands to `b`, or None where neither axis clearly dominates."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > 1.4 * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > 1.4 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def middle_item(scene: Scene) -> int | None:
    """Index of the object that stands between the two others, in a row or a column."""
    if len(scene.items) != 3:
        return None
    for i in range(3):
        a, b = (scene.items[j] for j in range(3) if j != i)
        to_a, to_b = relation(scene.items[i], a), relation(scene.items[i], b)
        if to_a and to_b and to_b == OPPOSITE[to_a]:
            return i
    return None


def sample_scene(
    rng: np.random.Generator, count: int | None = None, held_out: bool = False
) -> Scene:
    """A scene of one to three objects, no two of the same shape and colour.

    With `held_out` the scene holds at least one held-out combination, otherwise none.
    """
    count = count or int(rng.choice((1, 2, 3), p=(0.3, 0.35, 0.35)))
    while True:
        scene = Scene(tuple(_place(rng, count)), _pick(rng, *BACKGROUNDS))
        if _sound(scene) and scene.held_out == held_out:
            return scene


def sample_row(rng: np.random.Generator) -> Scene:
    """Three objects in a row or a column, none of a held-out combination.

    Of scenes of three objects that are drawn evenly one in fifty is such.
    """
    while True:
        along = rng.uniform(26, 38) + rng.uniform(15, 25, 3) * rng.permutation([-1, 0, 1])
        across = rng.uniform(0, SIDE) + rng.normal(0, 6, 3)
        if rng.random() < 0.5:
            along, across = across, along
        items = []
        for x, y in zip(along.tolist(), across.tolist(), strict=True):
            size = _pick(rng, "small", "small", "small", "large")  # there is hardly room for large
            items.append(Item(_pick(rng, *SHAPES), _pick(rng, *COLOURS), size, x, y))
        if not (all(map(_inside, items)) and _apart(items)):
            continue
        scene = Scene(tuple(items), _pick(rng, *BACKGROUNDS))
        if _sound(scene) and middle_item(scene) is not None and not scene.held_out:
            return scene


def sample_request(rng: np.random.Generator) -> tuple[Scene, str]:
    """A scene of the training world, and a caption of it as a user would write it.

    Scenes of three objects, which are harder, and of three in a row, which are rare, come more
    often. No caption names the size of what training shows in one size alone: a model would learn
    to ignore it.
    """
    while True:
        count = int(rng.choice((1, 2, 3), p=(0.2, 0.3, 0.5)))
        row = count == 3 and rng.random() < ROWS
        scene = sample_row(rng) if row else sample_scene(rng, count)
        caption = describe(scene, rng)
        if not any(f"large {colour} {shape}" in caption for shape, colour, _ in HELD_OUT):
            return scene, caption


def names_one_sized(caption: str) -> bool:
    """Whether a caption names a kind of object that training shows in one size alone."""
    return any(f"{colour} {shape}" in caption for shape, colour, _ in HELD_OUT)


def sample_crowd(rng: np.random.Generator) -> Scene:
    """A scene of none to four objects, some of them alike, none of a held-out combination."""
    items: list[Item] = []
    for _ in range(int(rng.choice(5, p=(0.05, 0.2, 0.25, 0.25, 0.25)))):
        for _ in range(20):
            (item,) = _place(rng, 1)
            if items and rng.random() < 0.25:
                item = replace(items[-1], x=item.x, y=item.y)
            if item.kind not in HELD_OUT and _inside(item) and _apart((*items, item)):
                items.append(item)
                break
    return Scene(tuple(items), _pick(rng, *BACKGROUNDS))


def near_misses(scene: Scene, rng: np.random.Generator) -> list[Scene]:
    """Three scenes that differ from this one so that no caption of it is true of them.

    An object of another shape, one of another colour, and, of several objects, two that traded
    colours or two that traded places. None is held out.
    """
    changes = ["shape", "colour", _pick(rng, "trade colours", "trade places")]
    if len(scene.items) == 1:
        changes[2] = _pick(rng, "shape", "colour")
    return [_changed(scene, change, rng) for change in changes]


def _changed(scene: Scene, change: str, rng: np.random.Generator) -> Scene:
    """The scene after one change; where none keeps to the training world, after one of shape."""
    for _ in range(20):
        items = list(scene.items)
        i = int(rng.integers(len(items)))
        j = (i + 1) % len(items)
        a, b = items[i], items[j]
        match change:
            case "shape":
                items[i] = replace(a, shape=_pick(rng, *SHAPES))
            case "colour":
                items[i] = replace(a, colour=_pick(rng, *COLOURS))
            case "trade colours":
                items[i], items[j] = replace(a, colour=b.colour), replace(b, colour=a.colour)
            case "trade places":
                items[i], items[j] = replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)
        changed = Scene(tuple(items), scene.background)
        if _sound(changed) and not changed.held_out and not _may_pass_for(scene, changed):
            return changed
    return _changed(scene, "shape", rng)


def _may_pass_for(scene: Scene, other: Scene) -> bool:
    """Whether a caption of a scene, which may leave sizes out, can be true of another."""
    named = {(item.shape, item.colour): item for item in other.items}
    found = [named.get((item.shape, item.colour)) for item in scene.items]
    items = tuple(item for item in found if item)
    if len(items) < len(scene.items):
        return False
    chained, theirs = (
        [relation(a, b) for a, b in itertools.pairwise(row)] for row in (scene.items, items)
    )
    middle = middle_item(scene)
    return chained == theirs or (
        middle is not None and middle == middle_item(replace(other, items=items))
    )


def _sound(scene: Scene) -> bool:
    """Whether objects differ in shape or colour, keep apart, and stand in clear relations."""
    kinds = {(item.shape, item.colour) for item in scene.items}
    chained = all(relation(a, b) for a, b in itertools.pairwise(scene.items))
    return len(kinds) == len(scene.items) and chained and _apart(scene.items)


def _place(rng: np.random.Generator, count: int) -> list[Item]:
    while True:
        items: list[Item] = []
        for _ in range(count):
            size = _pick(rng, *SIZES)
            reach = SIZES[size] + 2
            x, y = rng.uniform(reach, SIDE - reach, 2).tolist()
            items.append(Item(_pick(rng, *SHAPES), _pick(rng, *COLOURS), size, x, y))
        if _apart(items):
            return items


def _inside(item: Item) -> bool:
    reach = item.radius + 2
    return all(reach <= at <= SIDE - reach for at in (item.x, item.y))


def _apart(items: Sequence[Item]) -> bool:
    return all(
        math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + 3
        for a, b in itertools.combinations(items, 2)
    )


WHOLE = np.s_[:, :]
_GRID_Y, _GRID_X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5


def _signed_distance(item: Item, window: tuple[slice, slice]) -> np.ndarray:
    """Distance to the outline in pixels, negative inside, at the pixels of a window."""
    x, y, r = _GRID_X[window] - item.x, _GRID_Y[window] - item.y, item.radius
    match item.shape:
        case "circle":
            return np.hypot(x, y) - r
        case "square":
            return np.maximum(abs(x), abs(y)) - 0.86 * r
        case "triangle":
            y = y - 0.2 * r
            return np.maximum.reduce([y, 0.866 * x - 0.5 * y, -0.866 * x - 0.5 * y]) - 0.58 * r
        case "star":  # inside at least four of the pentagon's five sides
            angles = np.pi / 2 + 2 * np.pi * np.arange(5) / 5
            sides = [x * np.cos(a) + y * np.sin(a) for a in angles]
            return np.sort(sides, axis=0)[-2] - 0.36 * r
        case "cross":
            bar = np.maximum(abs(x) - 1.0 * r, abs(y) - 0.3 * r)
            return np.minimum(bar, np.maximum(abs(x) - 0.3 * r, abs(y) - 1.0 * r))
        case "ring":
            return abs(np.hypot(x, y) - 0.76 * r) - 0.24 * r
    raise ValueError(f"shape {item.shape!r} is not one of {SHAPES}")


def coverage(item: Item, window: tuple[slice, slice] = WHOLE) -> np.ndarray:
    """How much of each pixel the object covers, 0 to 1: (64, 64), or a window of it."""
    return np.clip(0.5 - _signed_distance(item, window), 0, 1)


def render(scene: Scene) -> np.ndarray:
    """The picture, anti-aliased: uint8 (64, 64, 3)."""
    picture = np.empty((SIDE, SIDE, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for item in scene.items:
        colour = np.array(COLOURS[item.colour], np.float32)
        picture += coverage(item)[..., None] * (colour - picture)
    return np.round(picture).astype(np.uint8)


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that is true of the scene, in one of many wordings."""
    items = scene.items
    middle = middle_item(scene)
    if len(items) == 1:
        text = _pick(rng, "{}", "{}", "there is {}", "a picture of {}").format(_noun(items[0], rng))
    elif middle is not None and rng.random() < 0.6:
        a, b = (items[j] for j in range(3) if j != middle)
        text = _pick(
            rng, "{0} between {1} and {2}", "{1} and {2} with {0} between them",
            "between {1} and {2} there is {0}",
        ).format(_noun(items[middle], rng), _noun(a, rng), _noun(b, rng))  # fmt: skip
    else:
        text = _related(items[0], items[1], rng)
        if len(items) == 3:
            link = relation(items[2], items[1])
            text += _pick(rng, ", and {0} {1} the {2}", "; {0} is {1} the {2}").format(
                _noun(items[2], rng), _worded(link, rng), f"{items[1].colour} {items[1].shape}"
            )
    if rng.random() < 0.3:
        return text
    return _pick(
        rng, "{0} on a {1} background", "{0} on {1}", "{0} against a {1} background",
        "on a {1} background, {0}",
    ).format(text, scene.background)  # fmt: skip


def _related(a: Item, b: Item, rng: np.random.Generator) -> str:
    link = relation(a, b)
    assert link is not None, "sample_scene chains its objects by clear relations"
    if rng.random() < 0.5:
        a, b, link = b, a, OPPOSITE[link]
    side = {
        "left of": ("on its left", "to its left"),
        "right of": ("on its right", "to its right"),
        "above": ("above it", "over it"),
        "below": ("below it", "under it"),
    }[link]
    return _pick(
        rng, "{0} {2} {1}", "{0} {2} {1}", "{0} is {2} {1}", "{2} {1} there is {0}",
        "{1} with {0} {3}",
    ).format(_noun(a, rng), _noun(b, rng), _worded(link, rng), _pick(rng, *side))  # fmt: skip


def spelled_out(scene: Scene, caption: str) -> str:
    """The caption with the relations that it leaves open, if any.

    Of two objects on the same side of a third, the last named is related to the first, which comes
    first, from above or from the left, and no longer to the third. An object between two others
    becomes below the first named, with the other below it. A caption that leaves nothing open
    stays.
    """
    if says_between(caption):
        for wording, spelled in _BETWEEN.items():
            caption = re.sub(wording, spelled, caption)
        return caption
    if len(scene.items) < 3:
        return caption
    first, middle, last = scene.items
    link = relation(last, middle)
    if relation(first, middle) != link:
        return caption
    place = "below" if link in ("left of", "right of") else "right of"
    side = r"(?:(?:to the )?(?:left|right) of|above|over|below|under)"
    return re.sub(
        f"{side} the {middle.colour} {middle.shape}",
        f"{place} the {first.colour} {first.shape}",
        caption,
    )


def sizes_named(scene: Scene, caption: str) -> str:
    """The caption, in which every object has a size.

    If the size is left open, a single object becomes large and several become small, as most of
    them are. Kinds that training only shows large are left out.
    """
    size = "large" if len(scene.items) == 1 else "small"
    for item in scene.items:
        if (item.shape, item.colour, "small") not in HELD_OUT:
            name = f"{item.colour} {item.shape}"
            caption = re.sub(f"an? {name}", f"a {size} {name}", caption)
    return caption


def says_between(caption: str) -> bool:
    """Whether a caption says of three objects that one is between two others."""
    return "between" in caption


def _named(name: str) -> str:
    return rf"(?P<{name}>an? (?:(?:{'|'.join(SIZES)}) )?(?P<{name}_kind>\w+ \w+))"


# Wordings of `describe`, and each with a word in the place of "between" that tells of two alone.
_BETWEEN = {
    f"{_named('x')} between {_named('a')} and {_named('b')}": (
        r"\g<x> below \g<a>; \g<b> is below the \g<x_kind>"
    ),
    f"{_named('a')} and {_named('b')} with {_named('x')} between them": (
        r"\g<a> with \g<x> below it; \g<b> is below the \g<x_kind>"
    ),
    f"between {_named('a')} and {_named('b')} there is {_named('x')}": (
        r"below \g<a> there is \g<x>; \g<b> is below the \g<x_kind>"
    ),
}


def _worded(link: str | None, rng: np.random.Generator) -> str:
    return {
        "left of": _pick(rng, "left of", "to the left of"),
        "right of": _pick(rng, "right of", "to the right of"),
        "above": _pick(rng, "above", "over"),
        "below": _pick(rng, "below", "under"),
    }[link or ""]


def _noun(item: Item, rng: np.random.Generator) -> str:
    size = "" if rng.random() < 0.2 else item.size + " "
    phrase = f"{size}{item.colour} {item.shape}"
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _pick(rng: np.random.Generator, *choices: str) -> str:
    return choices[rng.integers(len(choices))]
