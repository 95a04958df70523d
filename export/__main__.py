"""The command line: `python -m export CHECKPOINT`."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Annotated

import transformers
import typer
from rich.console import Console
from rich.table import Table

from export.checkpoint import CheckpointError, open_checkpoint
from export.convert import ParityError
from export.repository import ModelReport, build

console = Console()


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder in diffusers layout.")],
    repository: Annotated[Path, typer.Option(help="Model repository to build into.")] = Path(
        "model_repository"
    ),
) -> None:
    """Exports a checkpoint into a Triton model repository.

    Every model is compared with its PyTorch original. When anything fails, the repository
    stays as it was.
    """
    _quieten()
    try:
        with console.status("opening the checkpoint") as status:
            opened = open_checkpoint(checkpoint)
            reports = build(opened, repository, lambda model: status.update(f"exporting {model}"))
    except (CheckpointError, ParityError) as error:
        _stop(str(error))
    except OSError as error:
        _stop(f"cannot write into {repository}: {error.strerror or error}")
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
    for heading in ("model", "parameters", "MB", "precision", "error", "seconds"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for r in reports:
        table.add_row(
            r.model, f"{r.parameters / 1e6:.2f} M", f"{r.bytes / 1e6:.1f}", r.precision,
            f"{r.error:.1e}", f"{r.seconds:.1f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    typer.run(main)
