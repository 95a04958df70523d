"""A `Part` becomes an ONNX file, and is held against its PyTorch original."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch.export import Dim

from export.graph import join_heads, normalise_in_one_type
from export.part import Part
from export.pixels import add_pixels
from export.precision import Precision, in_precision
from networks.loading import first_line

TRIED = ((1, 2), (3, 2), (1, 3), (3, 3))  # rows and size of the inputs that parity is held on
LARGE = 2**29  # bytes of weights that are written beside the graph, one tensor at a time
OPSET = 23  # keeps attention as one node; ONNX Runtime 1.27 and TensorRT-RTX 1.7 run it


class ConversionError(RuntimeError):
    """PyTorch cannot run a model, or make an ONNX graph of it; the message names the model."""


class ParityError(RuntimeError):
    """An exported model does not say what its original says."""


def to_onnx(
    part: Part,
    file: Path,
    precision: Precision = Precision.FP32,
    opset: int = OPSET,
    rewrite: bool = True,
) -> tuple[int, int]:
    """Writes the ONNX file, strongly typed, with batch and named axes dynamic.

    Weights of `LARGE` go into `model.onnx.data` beside it. A decoder's file also gives pixels.
    Another `opset`, and no `rewrite` of attention, are for `benchmarks.graph` to compare with.

    Returns:
        Nodes of the graph as it was traced, and as it was written.

    Raises:
        ConversionError: PyTorch cannot trace the model, or has no ONNX operator for what it does.
    """
    program = trace(part, precision, opset)
    traced = len(program.model.graph)
    program.optimize()
    if rewrite:
        join_heads(program.model)
    normalise_in_one_type(program.model)
    weights = sum(tensor.const_value.nbytes for tensor in program.model.graph.initializers.values())
    program.save(file, external_data=weights >= LARGE)
    if part.served:
        add_pixels(file)
    return traced, len(program.model.graph)


def trace(part: Part, precision: Precision, opset: int = OPSET) -> torch.onnx.ONNXProgram:
    """The model's graph as PyTorch traces it, without optimisation.

    Raises:
        ConversionError: as `to_onnx`.
    """
    shapes = {
        name: {
            i: Dim.DYNAMIC for i, axis in enumerate(("batch", *spec.axes)) if isinstance(axis, str)
        }
        for name, spec in part.inputs.items()
    }
    try:
        return torch.onnx.export(
            in_precision(part, precision),
            kwargs=part.example(2, 2),
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            dynamic_shapes=shapes,
            opset_version=opset,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    except RuntimeError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        text = f"{part.name} cannot be converted to ONNX: {reason}"
        raise ConversionError(text) from error


@torch.no_grad()
def expected_outputs(part: Part) -> list[dict[str, np.ndarray]]:
    """What PyTorch gives in FP32 for the inputs that `parity_error` tries.

    Raises:
        ConversionError: PyTorch cannot run the model.
    """
    try:
        return [
            {name: tensor.numpy() for name, tensor in part.run(part.example(*tried)).items()}
            for tried in TRIED
        ]
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        text = f"{part.name} cannot be run by PyTorch: {first_line(error)}"
        raise ConversionError(text) from error


def parity_error(
    part: Part,
    file: Path,
    precision: Precision = Precision.FP32,
    expected: list[dict[str, np.ndarray]] | None = None,
) -> float:
    """Largest difference to PyTorch in FP32, as a share of the largest output.

    Taken over two batches and two sizes, and over all outputs. Where the `expected_outputs` of the
    part are given, it needs no weights any more.

    Raises:
        ParityError: the ONNX file does not take the inputs, or the error is over tolerance.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")  # a copy of the weights
    options.enable_cpu_mem_arena = False  # it keeps what casts of the weights took
    if precision is Precision.FP16:  # the CPU would keep every weight in FP32 too
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    if sorted(names) != sorted(part.inputs):
        raise ParityError(f"{part.name}: the ONNX file has inputs {names}, not {list(part.inputs)}")
    errors = []
    for tried, wanted in zip(TRIED, expected or expected_outputs(part), strict=True):
        inputs = {name: tensor.numpy() for name, tensor in part.example(*tried).items()}
        for got, want in zip(session.run([*wanted], inputs), wanted.values(), strict=True):
            if got.shape != want.shape or not np.isfinite(got).all():
                raise ParityError(f"{part.name}: got {got.shape}, expected finite {want.shape}")
            errors.append(np.abs(got - want).max() / np.abs(want).max())
    worst, tolerance = float(np.max(errors)), precision.tolerance(part)
    if not worst <= tolerance:  # NaN is not either
        raise ParityError(f"{part.name}: error {worst:.2e} against PyTorch is over {tolerance:.0e}")
    return worst
