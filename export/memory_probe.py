"""The memory of calls with one row, in a process that does nothing else.

`python -m export.memory_probe MODEL.onnx CONFIG.pbtxt TOKENS SIDE...` prints what
`export.memory.measure` returns, as JSON. Needs no PyTorch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from twinbrush.engine.config import TOKENS
from twinbrush.runtimes.attention import is_whole
from twinbrush.runtimes.onnx_runtime import open_session, read_config

STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def main(model: str, config: str, tokens: str, *sides: str) -> None:
    before = _status("VmRSS")
    session = open_session(Path(model), read_config(Path(config)))
    loaded = _status("VmRSS")
    rows = []
    for side in map(int, sides):
        # ONNX Runtime keeps what a call has taken for later ones, so that sizes add up.
        inputs = _one_row(session, side, int(tokens))
        peak = "VmHWM" if _forget_peak() else "VmRSS"
        session.run(None, inputs)
        taken = max(_status("VmRSS"), _status(peak)) - loaded
        rows.append([side * side, max(taken, 1)])
    found = {"rest": loaded - before, "rows": rows, "whole": is_whole(Path(model))}
    print(json.dumps(found))


def _forget_peak() -> bool:
    """Has the kernel count the peak anew; returns whether it can."""
    try:
        PEAK.write_text("5")
    except OSError:
        return False
    return True


def _one_row(session: Any, side: int, tokens: int) -> dict[str, np.ndarray]:
    """Inputs of one row; what varies besides the batch is a side, or the number of tokens."""
    rng, shapes = np.random.default_rng(0), {}
    for node in session.get_inputs():
        varying = tokens if node.name == TOKENS else side
        sizes = (size if isinstance(size, int) else varying for size in node.shape[1:])
        shapes[node.name] = [1, *sizes]
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
