"""`python -m benchmarks.graph`: what the form of an exported graph costs a call.

Each model is exported at opset 21 (attention in pieces), at opset 23 (attention as one node)
and as it is served (heads joined in that node), in FP32. The three take turns in one run.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from benchmarks.machine import write_result
from export.checkpoint import open_checkpoint
from export.convert import OPSET, to_onnx
from export.macs import native_rows
from export.part import Part
from export.repository import load_parts
from networks.loading import CheckpointError
from twinbrush.runtimes.onnx_runtime import open_session, read_config

FORMS = {
    "opset 21": {"opset": 21, "rewrite": False},
    f"opset {OPSET}": {"rewrite": False},
    "served": {},
}
BATCHES = (1, 16)


def main(
    checkpoint: Annotated[str, typer.Option(help="Folder or hub id.")] = "checkpoints/scenes-64",
    repository: Annotated[Path, typer.Option(help="Whose configurations are used.")] = Path(
        "model_repository"
    ),
    turns: Annotated[int, typer.Option(min=1, help="Calls of each graph and batch.")] = 60,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("benchmarks/results/graph.json"),
) -> None:
    """Counts nodes and times calls of every model in every form."""
    try:
        opened = open_checkpoint(checkpoint)
        parts = load_parts(opened).values()
    except CheckpointError as error:
        sys.exit(f"error: {error}")
    models = {part.name: compared(part, repository, turns) for part in track(parts)}
    write_result(
        out, "python -m benchmarks.graph", checkpoint=opened.name, turns=turns, models=models
    )
    print(json.dumps({name: forms["served"] for name, forms in models.items()}))


def compared(part: Part, repository: Path, turns: int) -> dict[str, dict[str, Any]]:
    """Nodes, and median milliseconds of a call by batch, of every form of a model."""
    config = read_config(repository / part.name / "config.pbtxt")
    found: dict[str, dict[str, Any]] = {}
    sessions = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, form in FORMS.items():
            file = Path(scratch, name, "model.onnx")
            file.parent.mkdir()
            traced, nodes = to_onnx(part, file, **form)
            found[name] = {"nodes_traced": traced, "nodes": nodes, "ms": {}}
            sessions[name] = open_session(file, config)
    for rows in BATCHES:
        feed = {name: tensor.numpy() for name, tensor in native_rows(part, rows).items()}
        taken: dict[str, list[float]] = {name: [] for name in sessions}
        for turn in range(turns + 1):
            for name, session in sessions.items():
                started = time.perf_counter()
                session.run(None, feed)
                if turn:  # the first is warm-up
                    taken[name].append(time.perf_counter() - started)
        for name, seconds in taken.items():
            found[name]["ms"][rows] = round(1000 * statistics.median(seconds), 3)
    return found


if __name__ == "__main__":
    typer.run(main)
