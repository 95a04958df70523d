"""LoRAs that requests switch on: their factors stand beside the layers of an exported network.

A layer with factors gives `W x + sum_k s_k B_k A_k x` (arXiv:2106.09685, section 4.1), with the
scales `s` of each row in the input `lora_scale` (B, K). So rows of different LoRAs share a call.
The factors of all LoRAs of a layer are one pair: ranks are joined, and each has its LoRA's scale.
This module does not know which networks are served.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.lora import Lora, read_factors
from export.part import Part, TensorSpec, normal
from networks.loading import CheckpointError
from twinbrush.engine.config import LORA_SCALE


class LoraScales:
    """The `lora_scale` (B, K) of the rows that a network computes now."""

    def __init__(self, count: int):
        self.count = count
        self.rows: Tensor | None = None

    @contextmanager
    def of(self, rows: Tensor | None) -> Iterator[None]:
        self.rows = rows
        try:
            yield
        finally:
            self.rows = None


@dataclass(frozen=True)
class Factors:
    """One LoRA's pair for a layer; alpha over rank is in `up`.

    Attributes:
        index: of the LoRA in its set.
        down: (rank, in) or (rank, in, kernel, kernel).
        up: (out, rank).
    """

    index: int
    down: Tensor
    up: Tensor


class LayerWithLoras(nn.Module):
    """A linear layer or convolution with the factors of LoRAs beside it.

    Other attributes are the layer's own, for code that looks at its sizes.
    """

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, factors: Sequence[Factors], scales: LoraScales
    ):
        super().__init__()
        self.layer, self.scales = layer, scales
        self.down = _frozen(torch.cat([f.down for f in factors]))
        self.up = _frozen(torch.cat([f.up for f in factors], dim=1))
        owners = [torch.full((len(f.down),), f.index) for f in factors]
        self.register_buffer("owners", torch.cat(owners))  # the LoRA of each rank

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, x: Tensor) -> Tensor:
        out, rows = self.layer(x), self.scales.rows
        if rows is None:
            return out
        scale = rows[:, self.owners].to(x.dtype)  # (B, ranks)
        if isinstance(self.layer, nn.Linear):
            low = F.linear(x, self.down)
            scale = scale.view(scale.shape[0], *[1] * (x.ndim - 2), -1)
            return out + F.linear(low * scale, self.up)
        layer = self.layer
        low = F.conv2d(x, self.down, None, layer.stride, layer.padding, layer.dilation)
        return out + F.conv2d(low * scale[:, :, None, None], self.up[:, :, None, None])


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)


def attach_loras(network: nn.Module, part: str, loras: Mapping[str, Lora]) -> LoraScales | None:
    """Puts the factors of LoRAs beside the layers of a network, in place.

    Args:
        network: a UNet or a text encoder.
        part: its name in the checkpoint.
        loras: by the names that requests use.

    Returns:
        Where its rows find their scales; None where no LoRA changes this part.

    Raises:
        CheckpointError: a LoRA does not fit, or has values that are not finite.
    """
    found: dict[nn.Module, list[Factors]] = {}
    for index, lora in enumerate(loras.values()):
        for key, layer, down, up, multiplier in read_factors(network, part, lora):
            up = multiplier * up.flatten(1)
            if not (down.isfinite().all() and up.isfinite().all()):
                raise CheckpointError(f"LoRA {lora.file}: {key} has values that are not finite")
            down = down.reshape(len(down), *layer.weight.shape[1:])
            found.setdefault(layer, []).append(Factors(index, down, up))
    return attach_factors(network, found, len(loras)) if found else None


def attach_factors(
    network: nn.Module, factors: Mapping[nn.Module, Sequence[Factors]], count: int
) -> LoraScales:
    """Puts factors beside the layers that they are for, in place; `count` is K."""
    scales = LoraScales(count)
    for name, layer in list(network.named_modules()):
        if layer in factors:
            owner, _, last = name.rpartition(".")
            changed = LayerWithLoras(layer, factors[layer], scales)
            setattr(network.get_submodule(owner), last, changed)
    return scales


def with_scales(part: Part, scales: LoraScales | None) -> Part:
    """A part whose module takes `lora_scale` too, or the part itself without scales."""
    if scales is None:
        return part
    spec = TensorSpec(torch.float32, (scales.count,))

    def example(batch: int, size: int) -> dict[str, Tensor]:
        return part.example(batch, size) | {LORA_SCALE: normal((batch, scales.count))}

    return replace(part, inputs=part.inputs | {LORA_SCALE: spec}, example=example)
