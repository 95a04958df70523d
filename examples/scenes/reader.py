"""Reads a picture of `scenes-64` back: background, and each object's attributes.

Knows the world's palette and outlines and nothing else: it never sees a prompt or a model.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from examples.scenes.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Item, coverage

CONTRAST = 45  # RGB distance from the background at which an object begins
SPECK = 25  # pixels; the smallest object has 60
CORE = 5  # pixels inside of an object, off its edge, that say its colour
MISFIT = 0.35  # share of an outline that may be wrong; what fits worse has no shape
STEPS = (2, 1, 0.5)  # pixels, by which an outline is moved to where it fits
NO_SHAPE = "none"
_ACROSS, _DOWN = np.mgrid[-1:2, -1:2].reshape(2, 9, 1, 1)


@dataclass(frozen=True)
class Reading:
    """What a picture shows; an object that is like no shape has `NO_SHAPE`."""

    background: str
    items: tuple[Item, ...]


def read(picture: np.ndarray) -> Reading:
    """Reads a picture: uint8 (64, 64, 3)."""
    pixels = picture.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = _nearest(np.median(border, axis=0), BACKGROUNDS)
    ground = np.array(BACKGROUNDS[background], np.float32)
    labels, count = _objects(np.linalg.norm(pixels - ground, axis=-1) > CONTRAST)
    items = []
    for k in range(1, count + 1):
        area = labels == k
        if area.sum() < SPECK:
            continue
        item = _item(pixels, ground, area, labels == 0)
        parts = _parts(pixels, area) if item.shape == NO_SHAPE else []
        split = [_item(pixels, ground, part, labels == 0) for part in parts]
        items += split if split and NO_SHAPE not in {item.shape for item in split} else [item]
    return Reading(background, tuple(items))


def _objects(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Connected parts of a mask, numbered from 1."""
    labels = np.zeros(mask.shape, np.int32)
    ndimage.label(mask, output=labels)
    return labels, int(labels.max())


def _parts(pixels: np.ndarray, area: np.ndarray) -> list[np.ndarray]:
    """The objects in an area, if they only touch: each pixel goes with the nearest one's core."""
    distances = [np.linalg.norm(pixels - colour, axis=-1) for colour in COLOURS.values()]
    nearest = np.argmin(distances, axis=0)
    cores = np.zeros(area.shape, np.int32)
    for k in range(len(COLOURS)):
        labels, count = _objects(np.asarray(ndimage.binary_erosion(area & (nearest == k)), bool))
        for part in range(1, count + 1):
            if (labels == part).sum() >= CORE:
                cores[labels == part] = cores.max() + 1
    if not cores.any():
        return []
    nearby = ndimage.distance_transform_edt(cores == 0, return_distances=False, return_indices=True)
    rows, columns = np.asarray(nearby)
    return [area & (cores[rows, columns] == k) for k in range(1, cores.max() + 1)]


def _item(pixels: np.ndarray, ground: np.ndarray, area: np.ndarray, empty: np.ndarray) -> Item:
    near = np.asarray(ndimage.binary_dilation(area, iterations=2), bool) & (area | empty)
    core = np.asarray(ndimage.binary_erosion(area), bool)
    seen = pixels[core if core.sum() >= CORE else area]
    colour = _nearest(np.median(seen, axis=0), COLOURS)
    contrast = np.median(seen, axis=0) - ground
    # Each pixel's share of the object's colour, as anti-aliasing would mix it.
    share = np.clip((pixels - ground) @ contrast / max(contrast @ contrast, 1e-6), 0, 1) * near
    if not share.any():  # in the middle its colours are the background's
        share = area.astype(np.float32)
    y, x = (float(np.average(index, weights=share)) for index in np.indices(share.shape))
    fits = [_fit(share, Item(*kind, x, y)) for kind in itertools.product(SHAPES, [colour], SIZES)]
    error, item = min(fits, key=lambda fit: fit[0])
    misfit = error / (share**2).sum()
    return item if misfit < MISFIT else replace(item, shape=NO_SHAPE)


def _fit(share: np.ndarray, item: Item) -> tuple[float, Item]:
    """The squared error of an outline, and where near `item` it is least."""
    window = _window(share, item)
    share = share[window]
    for step in STEPS:
        x, y = (item.x + step * _ACROSS, item.y + step * _DOWN)  # nine places at once
        errors = ((share - coverage(replace(item, x=x, y=y), window)) ** 2).sum((1, 2))
        best = int(errors.argmin())
        item = replace(item, x=float(x[best, 0, 0]), y=float(y[best, 0, 0]))
    return float(errors.min()), item


def _window(share: np.ndarray, item: Item) -> tuple[slice, slice]:
    """Outside of it there is neither share nor, wherever `_fit` looks, the item."""
    reach = item.radius + sum(STEPS) + 1
    rows, columns = ndimage.find_objects((share > 0).astype(int))[0]

    def around(middle: float, side: slice) -> slice:
        return slice(
            max(0, min(int(middle - reach), side.start)), max(int(middle + reach) + 1, side.stop)
        )

    return around(item.y, rows), around(item.x, columns)


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(colour - palette[name])))
