"""The precision that a served model computes in; what goes in and out of it is always FP32."""

from __future__ import annotations

import copy
from enum import StrEnum
from itertools import chain

from torch import nn

from export.part import Part


class Precision(StrEnum):
    """FP16 is held to a tolerance that its 11 bits of mantissa leave after a deep network."""

    FP32 = "fp32"
    FP16 = "fp16"

    def tolerance(self, part: Part) -> float:
        """Highest error against the FP32 original, as a share of the largest output."""
        return 1e-2 if self is Precision.FP16 else part.tolerance

    @property
    def bytes(self) -> int:
        """Of one weight."""
        return 2 if self is Precision.FP16 else 4


def in_precision(part: Part, precision: Precision) -> nn.Module:
    """The part's module, or for FP16 a copy of it with halved weights.

    Norms, softmax and the sinusoids of timesteps keep FP32 statistics by themselves: norms by
    ONNX's `stash_type`, attention in the kernels of ONNX Runtime and TensorRT, sinusoids in
    diffusers.
    """
    if precision is Precision.FP32:
        return part.module
    kept = {id(tensor) for module in part.full_precision for tensor in _tensors(module)}
    halved = {
        id(tensor): _half(tensor) if id(tensor) not in kept else tensor
        for tensor in _tensors(part.module)
        if tensor.is_floating_point()
    }
    return copy.deepcopy(part.module, halved)  # which never copies a weight in FP32


def halve(part: Part) -> None:
    """Halves the weights of a part in place, those that stay in FP32 apart."""
    kept = {id(tensor) for module in part.full_precision for tensor in _tensors(module)}
    part.module._apply(
        lambda tensor: (
            _half(tensor) if tensor.is_floating_point() and id(tensor) not in kept else tensor
        )
    )


def _half(tensor):
    half = tensor.detach().half()
    return nn.Parameter(half, requires_grad=False) if isinstance(tensor, nn.Parameter) else half


def _tensors(module: nn.Module):
    return chain(module.parameters(), module.buffers())
