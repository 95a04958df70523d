"""`Part`: everything that turning one network into a served model needs, as data."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a served model.

    Attributes:
        dtype: of torch.
        axes: each axis after the batch: its size, or a name where it varies.
    """

    dtype: torch.dtype
    axes: tuple[int | str, ...]


@dataclass(frozen=True)
class Part:
    """One served model.

    Attributes:
        name: of the model, the same everywhere.
        module: takes `inputs` by name and returns the output tensor, or a tuple of the
            outputs in order; all FP32 whatever the precision of its weights.
        inputs: in the order of the module's signature.
        outputs: by name, in the order of the module's result.
        example: (batch, size) -> inputs; `size` sets the axes that vary and means nothing else.
        tolerance: highest error against PyTorch, as a share of the largest output, in FP32.
        full_precision: modules inside that also an FP16 model computes in FP32.
        side: height and width of the latents that it was trained on, where axes vary.
        tokens: of one chunk of text, where their number varies.
        served: outputs that the server gives, where they are made from the module's.
    """

    name: str
    module: nn.Module
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    example: Callable[[int, int], dict[str, Tensor]]
    tolerance: float = 1e-4
    full_precision: tuple[nn.Module, ...] = ()
    side: tuple[int, int] | None = None
    tokens: int | None = None
    served: dict[str, TensorSpec] | None = None

    def __post_init__(self) -> None:
        self.module.eval()

    def drop_weights(self) -> None:
        """Frees the memory of the module's tensors; their shapes stay."""
        self.module.to("meta")
        gc.collect()  # a traced program holds the weights, and itself
        with suppress(OSError, AttributeError):  # other C libraries than glibc
            ctypes.CDLL(None).malloc_trim(0)  # which keeps what was freed

    @property
    def output(self) -> tuple[str, TensorSpec]:
        """Name and spec of the first output."""
        return next(iter(self.outputs.items()))

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of the PyTorch module by name."""
        result = self.module(**inputs)
        tensors = (result,) if isinstance(result, Tensor) else result
        return dict(zip(self.outputs, tensors, strict=True))


def integers(shape: tuple[int, ...], below: int) -> Tensor:
    """Token ids or timesteps to try a model on, always the same."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(0))


def normal(shape: tuple[int, ...]) -> Tensor:
    """Activations to try a model on, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def padding_mask(batch: int, length: int) -> Tensor:
    """(batch, length) int64; row `i` has a few more tokens than row `i - 1`."""
    lengths = torch.arange(batch)[:, None] * 3 % (length - 2) + 2
    return (torch.arange(length)[None] < lengths).long()
