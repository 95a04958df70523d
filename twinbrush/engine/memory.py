"""How much memory calls of the networks take, and what of it a budget allows.

`export.memory` measures a row of the UNet and a picture of the decoder at several sizes and
writes them into `pipeline.json`. Knows nothing of where the memory is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

DECODER, UNET = "vqgan_decoder", "unet"


@dataclass(frozen=True)
class CallMemory:
    """Of one network: bytes = `rest` + rows × (`cell` × cells + `square` × min(cells², `blocks`)).

    Attributes:
        rest: bytes of the loaded network between calls.
        cell: bytes a row and latent cell.
        square: bytes a row and square of the latent cells, of attention that holds all weights.
        blocks: square of the cells above which attention goes through its weights in blocks, or
            None where it never does.
    """

    rest: float
    cell: float
    square: float
    blocks: float | None = None

    def row(self, cells: int) -> float:
        """Bytes of one row of `cells` latent cells."""
        held = cells**2 if self.blocks is None else min(cells**2, self.blocks)
        return self.cell * cells + self.square * held


@dataclass(frozen=True)
class NetworkMemory:
    """`memory` of `pipeline.json`: what each network takes that grows with the pictures.

    Attributes:
        unet, decoder: what their calls take.
        others: bytes of the other networks.
    """

    unet: CallMemory
    decoder: CallMemory
    others: float

    @classmethod
    def of_json(cls, entry: Mapping[str, Any]) -> NetworkMemory:
        """From the entry in `pipeline.json`.

        Raises:
            KeyError, TypeError: it is not of this form.
        """
        names = ("rest", "cell", "square", "blocks")
        unet, decoder = (
            CallMemory(**{name: entry[model][name] for name in names}) for model in (UNET, DECODER)
        )
        return cls(unet, decoder, entry["others"])

    def without_blocks(self) -> NetworkMemory:
        """On runtimes of which it is not known that they go through attention in blocks."""
        unet, decoder = (replace(calls, blocks=None) for calls in (self.unet, self.decoder))
        return replace(self, unet=unet, decoder=decoder)

    @property
    def rest(self) -> float:
        """Bytes of all networks between calls."""
        return self.unet.rest + self.decoder.rest + self.others

    def image(self, cells: int, rows: int) -> float:
        """Bytes that an image of `cells` with `rows` UNet rows takes, networks included.

        One image is decoded while another is denoised, and runtimes keep what they had.
        """
        return self.rest + rows * self.unet.row(cells) + self.decoder.row(cells)


@dataclass(frozen=True)
class DeviceMemory:
    """What networks may take of the device that they run on.

    Attributes:
        budget: bytes for all networks.
        blocks: whether large attention is known to run in blocks.
        chosen: whether an operator has chosen the budget, rather than this code.
    """

    budget: float
    blocks: bool = True
    chosen: bool = True


class MemoryBudget:
    """What calls of the UNet and the decoder may hold side by side.

    The decoder's part is one picture of the largest size that fits at all; the UNet has the rest.

    Args:
        networks: what calls take.
        device: what there is. A budget that nobody has chosen has room for one native image.
        native: cells of a native picture.
        largest: cells of the largest picture that a request may ask for.
        least_rows: UNet rows of one image.
    """

    def __init__(
        self,
        networks: NetworkMemory,
        device: DeviceMemory,
        native: int,
        largest: int,
        least_rows: int,
    ):
        self.networks = networks if device.blocks else networks.without_blocks()
        needed = self.networks.image(native, least_rows)
        self.budget = device.budget if device.chosen else max(device.budget, needed)
        free = max(0.0, self.budget - networks.rest)
        fits = partial(self._fits_alone, least_rows)
        self.largest = _largest(fits, largest)
        self._decoder = self.networks.decoder.row(self.largest)
        self._unet = free - self._decoder

    def _fits_alone(self, rows: int, cells: int) -> bool:
        return self.networks.image(cells, rows) <= self.budget

    def describe(self) -> str:
        """A phrase for the log."""
        budget, rest = self.budget / 1e9, self.networks.rest / 1e9
        return f"{budget:.1f} GB, of which the networks take {rest:.1f} GB at rest"

    def used(self, cells: int, rows: int) -> float:
        """Bytes while a UNet call runs: its own, the networks', and the decoder's part."""
        return self.networks.rest + self._decoder + rows * self.networks.unet.row(cells)

    def fits(self, cells: int, rows: int) -> bool:
        """Whether one image can be made."""
        unet, decoder = self.networks.unet.row(cells), self.networks.decoder.row(cells)
        return rows * unet <= self._unet and decoder <= self._decoder

    def rows(self, cells: int) -> int:
        """UNet rows that a call may have; at least 1, of an image that `fits`."""
        return max(1, int(self._unet // self.networks.unet.row(cells)))

    def pictures(self, cells: int) -> int:
        """Pictures that a decoder call may have; at least 1."""
        return max(1, int(self._decoder // self.networks.decoder.row(cells)))


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, by bisection; 0 where none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
