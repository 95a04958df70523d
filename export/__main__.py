"""The command line: `python -m export CHECKPOINT`."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import warnings
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from export.checkpoint import Checkpoint, open_checkpoint
from export.convert import ConversionError, ParityError
from export.gate import PROMPTS as GENERAL_PROMPTS
from export.gate import SCENE_PROMPTS, Gate, GateError, Limits
from export.precision import Precision
from export.prune import parse_ratios, prune_checkpoint
from export.repository import MODELS, SOURCE, ModelReport, RepositoryError, build, check_machine
from export.resources import ResourceError
from export.tensorrt import TensorRTError, load_tensorrt
from networks.loading import CheckpointError
from networks.pruned import pruning_of

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
        typer.Option(
            help="Folder or hub id of a text model, where the checkpoint has none; with"
            " --gate-against one that CHECKPOINT has is kept."
        ),
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
    prune: Annotated[
        str | None,
        typer.Option(help="Share of MACs to remove by model, as in unet=0.3,clip_text=0.25."),
    ] = None,
    save_pruned: Annotated[
        Path | None, typer.Option(help="Keeps the pruned checkpoint in this new folder.")
    ] = None,
    gate: Annotated[
        bool, typer.Option("--gate", help="Refuses when optimised models paint worse.")
    ] = False,
    gate_against: Annotated[
        str | None,
        typer.Option(help="Unoptimised checkpoint, where CHECKPOINT is a pruned one."),
    ] = None,
    gate_loss: Annotated[
        float, typer.Option(min=0, help="Points of all-correct scenes that may be lost.")
    ] = Limits.loss,
    gate_psnr: Annotated[
        float,
        typer.Option(min=0, help="dB that other pictures must reach against the unoptimised."),
    ] = Limits.psnr,
    gate_prompts: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Default: {SCENE_PROMPTS} for scenes, else {len(GENERAL_PROMPTS)}."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Writes the table into this file, as JSON.")
    ] = None,
) -> None:
    """Exports a checkpoint into a Triton model repository.

    Takes any checkpoint of CLIP, UNet and VQGAN or VAE in diffusers layout. Stable Diffusion 1.5
    and LCM have no BERT: name one with --bert, and a fusion head that changes nothing is added.

    Every model is compared with its PyTorch original. With --gate, pictures of the optimised
    models are compared with those of the unoptimised. When anything fails, the repository
    stays as it was.
    """
    _quieten()
    models = _models(only)
    _check_report(report)
    _check_revision("--revision", revision, checkpoint)
    _check_revision("--bert-revision", bert_revision, bert)
    if precision not in list(Precision):
        _stop(f"--precision {precision!r} is not allowed: {' or '.join(Precision)}")
    ratios = _ratios(prune, models, save_pruned)
    limits = Limits(gate_loss, gate_psnr, gate_prompts)
    if not gate and (gate_against is not None or limits != Limits()):
        _stop("--gate-against, -loss, -psnr and -prompts say what --gate does: it is not given")
    try:
        trt = load_tensorrt() if tensorrt else None
        with ExitStack() as stack:
            status = stack.enter_context(console.status("opening the checkpoint"))
            # A pruned checkpoint has the text model that --bert gives to its original.
            keep_bert = gate_against is not None
            opened = open_checkpoint(checkpoint, bert, revision, bert_revision, keep_bert)
            original = _original(opened, gate, gate_against, bert, bert_revision)
            if ratios:
                check_machine(opened, repository, models, Precision(precision))
                folder = save_pruned
                if folder is None:
                    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "pruned"
                opened = prune_checkpoint(
                    opened, ratios, folder, lambda model: status.update(f"pruning {model}")
                )
            check = None
            if gate:
                optimised = _optimised(original, opened, models, Precision(precision))
                check = Gate(original, optimised, repository, limits)
            reports = build(
                opened, repository, lambda model: status.update(f"exporting {model}"), models,
                Precision(precision), trt, check,
            )  # fmt: skip
    except (
        CheckpointError, ConversionError, ParityError, GateError, RepositoryError, ResourceError,
        TensorRTError,
    ) as error:  # fmt: skip
        _stop(str(error))
    except OSError as error:
        _stop(f"cannot write into {repository}: {error.strerror or error}")
    if report is not None:
        report.write_text(json.dumps([asdict(line) for line in reports], indent=2) + "\n")
    console.print(_table(opened.name, reports))
    if check is not None:
        console.print(f"the gate passes: {check.verdict}", highlight=False, soft_wrap=True)
    console.print(f"{repository} serves {opened.name} now")


def _models(only: str) -> list[str]:
    models = [*dict.fromkeys(name.strip() for name in only.split(","))]
    if unknown := set(models) - set(MODELS):
        _stop(f"--only {min(unknown)!r} is no model: {', '.join(MODELS)} are")
    return models


def _check_report(report: Path | None) -> None:
    if report is not None and not report.parent.is_dir():
        _stop(f"--report {report}: {report.parent} is no folder")
    if report is not None and report.is_dir():
        _stop(f"--report {report} is a folder: name a file")
    if report is not None and not os.access(report if report.exists() else report.parent, os.W_OK):
        _stop(f"--report {report} cannot be written")


def _check_revision(flag: str, revision: str | None, source: str | None) -> None:
    if revision is not None and source is None:
        _stop(f"{flag} {revision}: there is no --bert")
    if revision is not None and source is not None and Path(source).is_dir():
        _stop(f"{flag} {revision}: {source} is a folder, only a hub id has revisions")


def _ratios(prune: str | None, models: list[str], save_pruned: Path | None) -> dict[str, float]:
    """What --prune asks for, held against the other flags."""
    if prune is None:
        if save_pruned is not None:
            _stop(f"--save-pruned {save_pruned}: nothing is pruned without --prune")
        return {}
    try:
        ratios = parse_ratios(prune)
    except ValueError as error:
        _stop(str(error))
    if left_out := set(ratios) - set(models):
        _stop(f"--prune {min(left_out)}: --only leaves it out")
    if save_pruned is not None and not save_pruned.parent.is_dir():
        _stop(f"--save-pruned {save_pruned}: {save_pruned.parent} is no folder")
    return ratios


def _original(
    opened: Checkpoint, gate: bool, against: str | None, bert: str | None, bert_revision: str | None
) -> Checkpoint:
    """What the gate compares with: the checkpoint of --gate-against, or else the opened one.

    Raises:
        CheckpointError: it cannot be opened, or the opened one is pruned.
    """
    if against is not None:
        return open_checkpoint(against, bert, None, bert_revision)
    pruned = [name for name, part in SOURCE.items() if pruning_of(opened.folders[part])]
    if gate and pruned:
        text = f"{opened.name} has {', '.join(pruned)} pruned"
        raise CheckpointError(f"--gate needs --gate-against, the unpruned checkpoint: {text}")
    return opened


def _optimised(
    original: Checkpoint, opened: Checkpoint, models: list[str], precision: Precision
) -> list[str]:
    """Models that are not what a plain export of `original` makes.

    Raises:
        CheckpointError: there is none.
    """
    if precision is not Precision.FP32:
        return models
    optimised = [
        name
        for name, part in SOURCE.items()
        if name in models and pruning_of(opened.folders[part]) != pruning_of(original.folders[part])
    ]
    if not optimised:
        raise CheckpointError(
            "--gate has nothing to compare: no model is optimised;"
            " --gate-against names the unpruned checkpoint of a pruned one"
        )
    return optimised


def _quieten() -> None:
    """Keeps the libraries' notes off the screen; what matters is raised."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _stop(reason: str) -> NoReturn:
    text = f"[red]export failed:[/] {escape(reason)}"
    console.print(text, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def _table(name: str, reports: list[ModelReport]) -> Table:
    table = Table(title=f"{name}, against PyTorch", title_justify="left")
    for heading in (
        "model", "weights", "MACs", "MB", "type", "nodes", "error", "s",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for r in reports:
        table.add_row(
            r.model, _millions(r.parameters, r.pruning and r.pruning.parameters),
            _millions(r.macs, r.pruning and r.pruning.macs), f"{r.bytes / 1e6:.1f}", r.precision,
            str(r.nodes), f"{r.error:.1e}", f"{r.seconds:.1f}",
        )  # fmt: skip
    return table


def _millions(count: int, pruned: tuple[int, int] | None) -> str:
    """A count, and what pruning changed it by."""
    change = f" ({100 * (pruned[1] / pruned[0] - 1):+.0f}%)" if pruned else ""
    return f"{count / 1e6:.2f} M{change}"


if __name__ == "__main__":
    typer.run(main)
