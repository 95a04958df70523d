"""What computes a model on this CPU: measured, held to a tolerance, written into its config.

The choice goes into the model's `config.pbtxt` as the CPU's accelerator, where the Python backend
reads it, and the native one of builds with OpenVINO, which takes its own precision. Knows nothing
of what a model means.
"""

from __future__ import annotations

import re
import tempfile
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.triton_config import MARKER
from twinbrush.runtimes import openvino_runtime
from twinbrush.runtimes.onnx_runtime import open_session, read_config

if TYPE_CHECKING:  # the precision of a model needs no torch here
    from export.part import Part

MEASURED = ("unet", "vqgan_decoder")  # what an image waits for
CANDIDATES = ("fp32", "bf16")  # of OpenVINO
# Highest error as a share of the largest output. BF16 has 8 bits of mantissa, FP16 has 11 and 1e-2.
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
GAIN = 0.95  # of ONNX Runtime's time that another runtime may take at most, to be worth a change
ROWS = (1, 4)
LONG_CALL = 2.0  # seconds; larger calls are not timed after such a one
CALLS = 3  # at least, after the first, which warms up
SECONDS = 0.3  # that calls of one size are timed at least: short ones need many for a quiet one
COMMENT = "# The CPU's runtime: written by `python -m export --cpu-runtime`.\n"
BLOCK = re.compile(re.escape(COMMENT) + r"optimization .*\n")


class CpuRuntime(StrEnum):
    """What `--cpu-runtime` takes; `AUTO` measures and takes the fastest within its tolerance."""

    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"
    AUTO = "auto"


class CpuRuntimeError(RuntimeError):
    """The runtime cannot be used; the message says why."""


@dataclass(frozen=True)
class Choice:
    """What computes one model.

    Attributes:
        runtime: "onnxruntime" or "openvino".
        precision: of OpenVINO; "fp32" for ONNX Runtime.
        ms_a_row: measured, by candidate.
        refused: why a candidate was not taken, by candidate.
    """

    runtime: str
    precision: str
    ms_a_row: dict[str, float]
    refused: dict[str, str]

    def describe(self, model: str) -> str:
        """The choice in a sentence."""
        times = ", ".join(f"{name} {ms:.1f} ms a row" for name, ms in self.ms_a_row.items())
        reasons = "".join(f"; not {name}: {why}" for name, why in self.refused.items())
        return f"{model} runs on {self.runtime} {self.precision}: {times}{reasons}"


def check(wish: CpuRuntime) -> None:
    """Raises CpuRuntimeError where OpenVINO is wanted and not installed."""
    if wish is CpuRuntime.OPENVINO and not openvino_runtime.is_installed():
        text = "openvino is not installed: pip install -r requirements/openvino.txt"
        raise CpuRuntimeError(f"--cpu-runtime openvino: {text}")


def choose(part: Part, file: Path, config: str, wish: CpuRuntime) -> Choice | None:
    """Times the candidates on the native size, one session at a time.

    Args:
        part: the model.
        file: its ONNX file.
        config: its `config.pbtxt`.

    Returns:
        The choice, or None where there is nothing to choose.

    Raises:
        CpuRuntimeError: OpenVINO is wanted and none of its precisions is within tolerance.
    """
    if wish is CpuRuntime.ONNXRUNTIME or part.name not in MEASURED:
        return None
    if not openvino_runtime.is_installed():
        return Choice("onnxruntime", "fp32", {}, {"openvino": "it is not installed"})
    plain = without_accelerator(config)
    reference, times, refused = _Reference(), {}, {}
    times["onnxruntime"] = _measured(part, file, plain, reference)[0]
    for precision in CANDIDATES:
        name = f"openvino {precision}"
        try:
            took, error = _measured(part, file, with_accelerator(plain, precision), reference)
        except RuntimeError as failure:
            refused[name] = str(failure)
            continue
        times[name] = took
        if not error <= TOLERANCE[precision]:  # NaN is not either
            refused[name] = f"its error {error:.1e} is over {TOLERANCE[precision]:.0e}"
    return _choice(times, refused, wish)


def _choice(times: dict[str, float], refused: dict[str, str], wish: CpuRuntime) -> Choice:
    """The fastest candidate that is not refused; ONNX Runtime where the others gain too little."""
    good = {name: ms for name, ms in times.items() if name not in refused}
    others = {name: ms for name, ms in good.items() if name != "onnxruntime"}
    if wish is CpuRuntime.OPENVINO:
        if not others:
            reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
            raise CpuRuntimeError(f"--cpu-runtime openvino: {reasons}")
        good = others
    best = min(good, key=lambda name: good[name])
    if wish is CpuRuntime.AUTO and good[best] > GAIN * good["onnxruntime"]:
        best = "onnxruntime"
    runtime, _, precision = best.partition(" ")
    rounded = {name: round(ms, 2) for name, ms in times.items()}
    return Choice(runtime, precision or "fp32", rounded, refused)


class _Reference:
    """Outputs of the first session on examples, which those of the others are compared with."""

    def __init__(self):
        self.outputs: list[np.ndarray] = []

    def error(self, outputs: list[np.ndarray]) -> float:
        if not self.outputs:
            self.outputs = outputs
        pairs = zip(outputs, self.outputs, strict=True)
        return max(output_error(got, wanted) for got, wanted in pairs)


def output_error(got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, as a share of the largest number that is wanted."""
    got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def _measured(part: Part, file: Path, config: str, reference: _Reference) -> tuple[float, float]:
    """Milliseconds a row, the mean over numbers of rows, and the error against the reference."""
    from export.macs import native_rows

    with tempfile.NamedTemporaryFile("w", suffix=".pbtxt") as written:
        written.write(config)
        written.flush()
        session = open_session(file, read_config(Path(written.name)))

    def run(rows) -> list[np.ndarray]:
        return session.run([*part.outputs], {name: tensor.numpy() for name, tensor in rows.items()})

    examples = [part.example(batch, size) for batch, size in ((1, 2), (3, 3))]
    outputs = [output for example in examples for output in run(example)]
    error = reference.error(outputs)
    taken = []
    for count in ROWS:
        rows = native_rows(part, count)
        run(rows)
        seconds: list[float] = []
        while len(seconds) < CALLS or sum(seconds) < SECONDS:
            started = time.perf_counter()
            run(rows)
            seconds.append(time.perf_counter() - started)
        taken.append(min(seconds) / count)
        if min(seconds) > LONG_CALL:
            break
    return 1000 * float(np.mean(taken)), error


def with_accelerator(config: str, precision: str) -> str:
    """`config` with OpenVINO as the CPU's accelerator.

    Raises:
        CpuRuntimeError: it has an `optimization` of its own, which has room for one block only.
    """
    config = without_accelerator(config)
    settings, marker, tensors = config.partition(MARKER)
    if re.search(r"^\s*optimization\b", settings, re.MULTILINE):
        raise CpuRuntimeError("config.pbtxt has an optimization of its own, which stays")
    block = (
        'optimization { execution_accelerators { cpu_execution_accelerator { name: "openvino"'
        f' parameters {{ key: "precision" value: "{precision}" }} }} }} }}\n'
    )
    return settings.rstrip("\n") + "\n" + COMMENT + block + "\n" + marker + tensors


def without_accelerator(config: str) -> str:
    """`config` without what `with_accelerator` wrote."""
    return BLOCK.sub("", config)
