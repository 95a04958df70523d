"""`python -m benchmarks.int8`: what INT8 by ONNX Runtime gains on this CPU, and what it costs.

Every network is quantised dynamically: weights by channel, activations by call. Networks run on
the inputs that the engine gave them for prompts; FP32 and INT8 take turns. INT8 would be worth
serving where it is faster within the tolerance that `--cpu-runtime` holds BF16 to.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from onnxruntime.quantization import QuantType, quantize_dynamic
from rich.progress import track

from benchmarks.local_engine import local_engine
from benchmarks.machine import write_result
from export.cpu_runtime import GAIN, TOLERANCE, output_error
from export.painting import paint
from twinbrush.runtimes.onnx_runtime import LocalModels, open_session, read_config

OPERATORS = {"products": ("MatMul", "Gemm"), "all": ("MatMul", "Gemm", "Conv")}
PROMPTS = [
    "a large red circle left of a small blue square", "a green star above a yellow ring",
    "two purple triangles on a white background", "a small orange cross below a blue circle",
]  # fmt: skip


class Recorded:
    """`Models` that keep the inputs of the call of most rows, by model."""

    def __init__(self, models: LocalModels):
        self._models = models
        self.calls: dict[str, Mapping[str, np.ndarray]] = {}

    def run(self, model: str, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """See `Models.run`."""
        if _rows(inputs) > _rows(self.calls.get(model, {})):
            self.calls[model] = {name: np.array(value) for name, value in inputs.items()}
        return self._models.run(model, inputs)


def _rows(inputs: Mapping[str, np.ndarray]) -> int:
    return max(map(len, inputs.values()), default=0)


def main(
    repository: Annotated[Path, typer.Option(help="Exported, in FP32.")] = Path("model_repository"),
    turns: Annotated[int, typer.Option(min=1, help="Calls of each file.")] = 15,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("benchmarks/results/int8.json"),
) -> None:
    """Times every network in FP32 and INT8, and compares what they return."""
    models = Recorded(LocalModels(repository))
    with local_engine(repository, models) as engine:
        paint(engine, PROMPTS)
    found = {
        model: compared(repository / model, inputs, turns)
        for model, inputs in track(models.calls.items())
    }
    write_result(
        out, "python -m benchmarks.int8", turns=turns, gain=GAIN, tolerance=TOLERANCE["bf16"],
        models=found,
    )  # fmt: skip
    print(json.dumps({name: forms["worth_serving"] for name, forms in found.items()}))


def compared(model: Path, inputs: Mapping[str, np.ndarray], turns: int) -> dict[str, Any]:
    """Speed and error of a model's INT8 files against its FP32 file, on the inputs of a call.

    Args:
        model: folder of the model in a repository.
        inputs: by name; more than the model takes is ignored.
        turns: calls of each file.

    Returns:
        Rows of the call; by set of operators the median ratio of the times (FP32 over INT8) and
        the error as a share of the largest output; and the sets that are worth serving.
    """
    config = read_config(model / "config.pbtxt")
    file, outputs = model / "1" / "model.onnx", [o["name"] for o in config["output"]]
    sessions = {"fp32": open_session(file, config)}
    with tempfile.TemporaryDirectory() as scratch:
        for name, operators in OPERATORS.items():
            made = Path(scratch, f"{name}.onnx")
            quantise(file, made, operators)
            sessions[name] = open_session(made, config)
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    returned: dict[str, Sequence[Any]] = {}
    for turn in range(turns + 1):
        for name, session in sessions.items():
            started = time.perf_counter()
            returned[name] = session.run(outputs, dict(inputs))
            if turn:  # the first is warm-up
                seconds[name].append(time.perf_counter() - started)
    forms: dict[str, Any] = {"rows": _rows(inputs), "worth_serving": []}
    for name in OPERATORS:
        pairs = zip(seconds["fp32"], seconds[name], strict=True)
        speed = statistics.median(plain / quantised for plain, quantised in pairs)
        worst = max(map(output_error, returned[name], returned["fp32"]))
        forms[name] = {"speed": round(speed, 2), "error": round(worst, 4)}
        if speed * GAIN > 1 and worst <= TOLERANCE["bf16"]:
            forms["worth_serving"].append(name)
    return forms


def quantise(file: Path, made: Path, operators: tuple[str, ...]) -> None:
    """Writes an ONNX file whose `operators` compute in INT8; the rest of the graph stays FP32."""
    quantize_dynamic(
        file, made, op_types_to_quantize=list(operators), per_channel=True,
        weight_type=QuantType.QInt8, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
