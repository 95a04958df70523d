"""A `Part` becomes an ONNX file, and is held against its PyTorch original."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch.export import Dim

from export.part import Part

OPSET = 23  # keeps attention as one node; ONNX Runtime 1.27 and later run it


class ParityError(RuntimeError):
    """An exported model does not say what its original says."""


def to_onnx(part: Part, file: Path) -> None:
    """Writes the ONNX file, with batch and named axes dynamic.

    Weights of over 2 GB go into `model.onnx.data` beside it.
    """
    example = part.example(2, 2)
    shapes = {
        name: {
            i: Dim.DYNAMIC for i, axis in enumerate(("batch", *spec.axes)) if isinstance(axis, str)
        }
        for name, spec in part.inputs.items()
    }
    size = sum(p.numel() * p.element_size() for p in part.module.parameters())
    torch.onnx.export(
        part.module,
        kwargs=example,
        f=str(file),
        input_names=list(part.inputs),
        output_names=[part.output[0]],
        dynamic_shapes=shapes,
        opset_version=OPSET,
        dynamo=True,
        external_data=size > 1.9e9,
        verbose=False,
    )


@torch.no_grad()
def parity_error(part: Part, file: Path) -> float:
    """Largest difference to PyTorch, as a share of the largest output.

    Taken over two batches and two sizes.

    Raises:
        ParityError: the ONNX file does not take the inputs, or the error is over tolerance.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    if sorted(names) != sorted(part.inputs):
        raise ParityError(f"{part.name}: the ONNX file has inputs {names}, not {list(part.inputs)}")
    worst = 0.0
    for batch, size in ((1, 2), (3, 2), (1, 3), (3, 3)):
        inputs = part.example(batch, size)
        expected = part.module(**inputs).numpy()
        (got,) = session.run([part.output[0]], {k: v.numpy() for k, v in inputs.items()})
        if got.shape != expected.shape or not np.isfinite(got).all():
            raise ParityError(f"{part.name}: got {got.shape}, expected finite {expected.shape}")
        worst = max(worst, float(np.abs(got - expected).max() / np.abs(expected).max()))
    if worst > part.tolerance:
        raise ParityError(
            f"{part.name}: error {worst:.2e} against PyTorch is over {part.tolerance:.0e}"
        )
    return worst
