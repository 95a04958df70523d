"""Multiply-accumulates and attention of a model, for one row at the size that it was trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from export.part import Part


@dataclass(frozen=True)
class Work:
    """What one row of a model takes.

    Attributes:
        macs: of matrix products and convolutions, attention's own among them.
        weights, pairs: of its largest self-attention: weights over all heads, and pairs of
            positions, both as shares of the square of a row's latent cells.
    """

    macs: int
    weights: float
    pairs: float


def count_work(part: Part) -> Work:
    """The work of a row at the native size, which is not computed."""
    shapes = FakeTensorMode(allow_non_fake_inputs=True)  # nothing is computed, nothing held
    rows = {name: shapes.from_tensor(tensor) for name, tensor in native_rows(part, 1).items()}
    counter, plain = FlopCounterMode(display=False), sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), shapes, counter, plain, _Attentions() as attentions:
        part.module(**rows)  # by the plain kernel, whose products are counted
    weights, pairs = max(attentions.found, default=(0, 0))
    squared = math.prod(part.side or (1, 1)) ** 2
    return Work(counter.get_total_flops() // 2, weights / squared, pairs / squared)


def count_macs(part: Part) -> int:
    """MACs of a row at the native size."""
    return count_work(part).macs


class _Attentions(TorchFunctionMode):
    """Collects how many weights and pairs of positions each self-attention has."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, int]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.scaled_dot_product_attention:
            query, key = args[:2]
            if query.shape[-2] == key.shape[-2]:
                weights = math.prod(query.shape[:-1]) * key.shape[-2]
                self.found.append((weights, query.shape[-2] * key.shape[-2]))
        return function(*args, **(kwargs or {}))


def positions(part: Part) -> dict[nn.Module, int]:
    """How many positions each linear layer and convolution gives, tokens or pixels."""
    found: dict[nn.Module, int] = {}

    def note(layer: nn.Module, _: tuple, output: Tensor) -> None:
        found[layer] = found.get(layer, 0) + output.numel() // len(layer.weight)

    layers = [m for m in part.module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    with torch.no_grad():
        part.module(**native_rows(part, 1))
    for hook in hooks:
        hook.remove()
    return found


def native_rows(part: Part, count: int) -> dict[str, Tensor]:
    """Example inputs of `count` rows; latents have the native size, texts one chunk."""
    height, width = part.side or (1, 1)
    sides = {"height": height, "width": width, "tokens": part.tokens}
    rows = part.example(count, max(height, width))
    for name, spec in part.inputs.items():
        for axis, size in enumerate(spec.axes, start=1):
            if isinstance(size, str):
                rows[name] = rows[name].narrow(axis, 0, sides[size]).contiguous()
    return rows
