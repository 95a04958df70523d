"""The command line: `python -m export CHECKPOINT`."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import transformers
import typer
from rich.console import Console
from rich.table import Table

from export.checkpoint import CheckpointError, open_checkpoint
from export.convert import ParityError
from export.precision import Precision
from export.repository import MODELS, ModelReport, build
from export.resources import ResourceError
from export.tensorrt import TensorRTError, load_tensorrt

console = Console()


def main(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder or hub id of a checkpoint in diffusers layout.")
    ],
    repository: Annotated[Path, typer.Option(help="Model repository to build into.")] = Path(
        "model_repository"
    ),
    bert: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of a text model, where the checkpoint has none."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Commit, tag or branch, where CHECKPOINT is a hub id.")
    ] = None,
    bert_revision: Annotated[str | None, typer.Option(help="The same of --bert.")] = None,
    only: Annotated[
        str, typer.Option(help=f"Models to rebuild, with commas: {', '.join(MODELS)}.")
    ] = ",".join(MODELS),
    precision: Annotated[
        str, typer.Option(help=f"That the models compute in: {' or '.join(Precision)}.")
    ] = Precision.FP32.value,
    tensorrt: Annotated[
        bool, typer.Option("--tensorrt", help="Build TensorRT plans too, for this machine.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Writes the table into this file, as JSON.")
    ] = None,
) -> None:
    """Exports a checkpoint into a Triton model repository.

    Takes any checkpoint of CLIP, UNet and VQGAN or VAE in diffusers layout. Stable Diffusion 1.5
    and LCM have no BERT: name one with --bert, and a fusion head that changes nothing is added.

    Every model is compared with its PyTorch original. When anything fails, the repository
    stays as it was.
    """
    _quieten()
    models = [name.strip() for name in only.split(",")]
    if report is not None and not report.parent.is_dir():
        _stop(f"--report {report}: {report.parent} is no folder")
    if unknown := set(models) - set(MODELS):
        _stop(f"--only {min(unknown)!r} is no model: {', '.join(MODELS)} are")
    if precision not in list(Precision):
        _stop(f"--precision {precision!r} is not allowed: {' or '.join(Precision)}")
    try:
        trt = load_tensorrt() if tensorrt else None
        with console.status("opening the checkpoint") as status:
            opened = open_checkpoint(checkpoint, bert, revision, bert_revision)
            reports = build(
                opened, repository, lambda model: status.update(f"exporting {model}"), models,
                Precision(precision), trt,
            )  # fmt: skip
    except (CheckpointError, ParityError, ResourceError, TensorRTError) as error:
        _stop(str(error))
    except OSError as error:
        _stop(f"cannot write into {repository}: {error.strerror or error}")
    if report is not None:
        report.write_text(json.dumps([asdict(line) for line in reports], indent=2) + "\n")
    console.print(_table(opened.name, reports))
    console.print(f"{repository} serves {opened.name} now")


def _quieten() -> None:
    """Keeps the libraries' notes off the screen; what matters is raised."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()


def _stop(reason: str) -> None:
    console.print(f"[red]export failed:[/] {reason}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def _table(name: str, reports: list[ModelReport]) -> Table:
    table = Table(title=f"{name}, against PyTorch", title_justify="left")
    for heading in ("model", "parameters", "MB", "precision", "nodes", "error", "seconds"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for r in reports:
        table.add_row(
            r.model, f"{r.parameters / 1e6:.2f} M", f"{r.bytes / 1e6:.1f}", r.precision,
            f"{r.nodes_traced} → {r.nodes}", f"{r.error:.1e}", f"{r.seconds:.1f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    typer.run(main)
