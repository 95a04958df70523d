"""What calls of the UNet and the decoder take of memory, measured on ONNX Runtime as it is served.

`export.memory_probe` measures, in a process of its own, because what a process has freed it may
still hold. Larger sizes than can be tried follow from them: convolutions take memory by cells,
attention whose weights are held at once by their square. Knows no weights.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from export.resources import free_memory
from twinbrush.engine.config import MAX_SIDE_FACTOR
from twinbrush.engine.memory import CallMemory
from twinbrush.runtimes.attention import MOST_PAIRS

MAX_MACS = 1e12  # of the largest row that is tried: some ten seconds on two CPUs
PARTS = (0.5, 0.7, 1.0)  # of the largest side that is tried
FLOAT_BYTES = 4
# ONNX Runtime's arena grows in blocks of powers of two, so that sizes differ by this much a cell.
ARENA = 1.4
LOADING = 3.0  # times the bytes of its files that loading and trying a model may take
SECONDS = 900.0  # that the measurement of one model may take


class MeasureError(RuntimeError):
    """The memory of a model could not be measured."""


@dataclass(frozen=True)
class Growth:
    """What decides how the memory of a model grows with the size of pictures.

    Attributes:
        native: height and width of the latents that it was trained on.
        multiple: sides of latents must be multiples of it.
        macs: multiply-accumulates of one row at the native size.
        weights, pairs: of its largest attention, as shares of the square of the cells.
        tokens: of the longest text that it takes; 1 where it takes none.
    """

    native: tuple[int, int]
    multiple: int
    macs: float
    weights: float
    pairs: float
    tokens: int = 1

    def sides(self) -> list[int]:
        """Sides of latents to try, ascending, that take at most `MAX_MACS` a row."""
        side = math.sqrt(self.native[0] * self.native[1])
        largest = side * min(MAX_SIDE_FACTOR, math.sqrt(MAX_MACS / max(self.macs, 1)))
        tried = {max(1, round(part * largest / self.multiple)) * self.multiple for part in PARTS}
        return sorted(tried)


def measure(model: Path, config: Path, sides: Sequence[int], tokens: int = 1) -> dict[str, Any]:
    """Runs a model in a process of its own.

    Args:
        model: the ONNX file.
        config: its `config.pbtxt`.
        sides: of the square latents that are tried, in cells, ascending.
        tokens: of the text, where the model takes one.

    Returns:
        `rest`, bytes of the loaded model; `rows`, [cells, bytes of a call with one row] each;
        `whole`, whether attention holds all its weights also where they are many.

    Raises:
        MeasureError: there is not enough memory, or the process failed; the message says why.
    """
    needed, free = LOADING * _bytes(model.parent), free_memory()
    if needed > free:
        text = f"loading it may take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise MeasureError(f"{model.parent.parent.name}: {text}")
    command = [
        sys.executable,
        "-m",
        "export.memory_probe",
        str(model),
        str(config),
        str(tokens),
        *map(str, sides),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise MeasureError(f"{model.parent.parent.name} took more than {SECONDS:g} s") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise MeasureError(f"{model.parent.parent.name}: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def fit(measured: Mapping[str, Any], growth: Growth) -> dict[str, Any]:
    """The fields of `engine.memory.CallMemory`, which no measurement exceeds, and its `rows`.

    Args:
        measured: of `measure`.
        growth: of the model.
    """
    square = FLOAT_BYTES * growth.weights
    blocks = None if measured["whole"] or not growth.pairs else MOST_PAIRS / growth.pairs
    calls = CallMemory(measured["rest"], 0.0, square, blocks)
    cell = max(
        # Attention may not be where the most is held, so not all of its weights need be in it.
        max((taken - calls.row(cells)) / cells, taken / cells / 2)
        for cells, taken in measured["rows"]
    )
    return asdict(replace(calls, cell=ARENA * cell)) | {"rows": measured["rows"]}


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
