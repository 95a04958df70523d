"""Memory of UNet and decoder calls at sizes that export did not try, against what it foresees.

python -m benchmarks.memory [--repository FOLDER] [--sides 48,64,96]

Each size runs as export measures it, one row in a process without others. Prints a table and, as
the last line, JSON; `--result` writes that line into a file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.machine import describe
from export.memory import measure
from export.pipeline import memory_of
from twinbrush.engine.config import ENGINE, PipelineConfig
from twinbrush.engine.memory import DECODER, UNET, CallMemory


def compare(repository: Path, model: str, sides: list[int]) -> list[dict[str, float]]:
    """Bytes foreseen and taken of a call with one row, by the side of square latents in cells."""
    entry = dict(memory_of(repository / ENGINE)[model])
    tried = {round(cells**0.5) for cells, _ in entry.pop("rows")}
    calls = CallMemory(**entry)
    folder, config = repository / model, PipelineConfig.load(repository / ENGINE / "pipeline.json")
    tokens = config.chunk_length * config.max_chunks
    wanted = sorted(tried | set(sides))  # as they add up in a process
    file = folder / "1" / "model.onnx"
    rows = measure(file, folder / "config.pbtxt", wanted, tokens)["rows"]
    return [
        {
            "side": round(cells**0.5),
            "tried_by_export": round(cells**0.5) in tried,
            "taken": taken,
            "foreseen": round(calls.row(cells)),
            "ratio": round(calls.row(cells) / taken, 2),
            "whole_attention": round(calls.square * cells**2),
        }
        for cells, taken in rows
    ]


def main(
    repository: Annotated[Path, typer.Option(help="An exported repository.")] = Path(
        "model_repository"
    ),
    sides: Annotated[str, typer.Option(help="Sides of latents, in cells.")] = "48,64,96",
    result: Annotated[Path | None, typer.Option(help="File for the JSON.")] = None,
) -> None:
    """Compares what calls take of memory with what `pipeline.json` foresees."""
    wanted = [int(side) for side in sides.split(",")]
    found = {model: compare(repository, model, wanted) for model in (UNET, DECODER)}
    for model, lines in found.items():
        for line in lines:
            taken, foreseen = (f"{line[name] / 1e6:8.1f} MB" for name in ("taken", "foreseen"))
            print(f"{model:14} {line['side']:4} cells  taken {taken}  foreseen {foreseen}", end="")
            print(f"  {line['ratio']:.2f}{'  (tried)' if line['tried_by_export'] else ''}")
    checkpoint = json.loads((repository / ENGINE / "pipeline.json").read_text())["checkpoint"]
    command = f"python -m benchmarks.memory --sides {sides}"
    line = {"checkpoint": checkpoint, "command": command, "machine": describe(), "calls": found}
    if result is not None:
        result.write_text(json.dumps(line, indent=2) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    typer.run(main)
