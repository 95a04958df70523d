"""How much one call of a network holds, by the size of its pictures.

One rule for the engine, which fills calls, and for TensorRT plans, which are built for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from twinbrush.engine.config import PipelineConfig

LEAST_ROWS = 2  # what an image with classifier-free guidance takes
ROWS_A_PICTURE = 8  # of the UNet: a decoder, at the pictures' own size, holds more of one at a time


@dataclass(frozen=True)
class Capacity:
    """Of calls with pictures that are no wider and no higher than `side` pixels.

    Attributes:
        rows: of the UNet, at most.
    """

    side: int
    rows: int


def capacities(config: PipelineConfig, max_rows: int) -> tuple[Capacity, ...]:
    """By ascending side: `max_rows` up to the native one, and a quarter with each doubling.

    Raises:
        ValueError: `max_rows` is too small for one image.
    """
    if max_rows < LEAST_ROWS:
        raise ValueError(f"max_rows={max_rows} is not allowed: at least {LEAST_ROWS}")
    steps, side, rows = [], config.native_side, max_rows
    while side < config.max_side:
        steps.append(Capacity(side, rows))
        side, rows = 2 * side, max(LEAST_ROWS, rows // 4)
    return (*steps, Capacity(config.max_side, rows))


def decoder_pictures(rows: int) -> int:
    """What a decoder call holds where one of the UNet holds `rows`."""
    return max(1, rows // ROWS_A_PICTURE)
