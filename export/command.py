"""What an export command does with its checked options; the typer commands only declare flags.

Knows no flag names beyond those in its messages, and no measure of pictures.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from export import pipeline
from export.checkpoint import Checkpoint, Serving, open_checkpoint
from export.convert import ConversionError, ParityError
from export.cpu_runtime import MEASURED, CpuRuntime, CpuRuntimeError
from export.cpu_runtime import check as check_cpu_runtime
from export.gate import Gate, GateError, MakeMeasure
from export.lora import Lora, read_lora
from export.precision import Precision
from export.prune import parse_ratios, prune_checkpoint
from export.repository import (
    ALL_MODELS,
    SOURCE,
    ModelReport,
    RepositoryError,
    build,
    check_machine,
    models_of,
)
from export.resources import ResourceError
from export.scheduler import parse_defaults
from export.source import Source
from export.tensorrt import TensorRTError, load_tensorrt
from networks.loading import CheckpointError, first_line
from networks.pruned import pruning_of

FAILURES = (
    CheckpointError, ConversionError, ParityError, GateError, RepositoryError, ResourceError,
    TensorRTError, CpuRuntimeError,
)  # fmt: skip
LORA_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MAX_LORAS = 32  # that requests can switch on
console = Console()


class OptionError(ValueError):
    """An option cannot be used; the message names it, its value and what is allowed."""


@dataclass(frozen=True)
class PruneOptions:
    """Shares of MACs to remove by model, and the new folder that keeps the pruned checkpoint."""

    ratios: dict[str, float]
    folder: Path | None = None


@dataclass(frozen=True)
class GateOptions:
    """The measure of the gate, and the unoptimised checkpoint where the exported one is pruned."""

    measure: MakeMeasure
    against: str | None = None


@dataclass(frozen=True)
class Options:
    """Everything that an export is asked for.

    Attributes:
        source: where the parts of the checkpoint are.
        repository: to build into.
        models: to build; the others stay as an earlier export left them. None builds all.
        precision: of the built models.
        tensorrt: whether plans for this machine are built too.
        prune: None exports the checkpoint as it is.
        gate: None accepts every export that passes parity.
        serving: what changes of the checkpoint.
        cpu_runtime: how the runtime of the CPU is chosen.
    """

    source: Source
    repository: Path
    models: list[str] | None
    precision: Precision = Precision.FP32
    tensorrt: bool = False
    prune: PruneOptions | None = None
    gate: GateOptions | None = None
    serving: Serving = field(default_factory=Serving)
    cpu_runtime: CpuRuntime = CpuRuntime.ONNXRUNTIME


def parse_models(only: str | None) -> list[str] | None:
    """The models of `--only`, each once; None stands for all of the checkpoint."""
    if only is None:
        return None
    models = [*dict.fromkeys(name.strip() for name in only.split(","))]
    if unknown := set(models) - set(ALL_MODELS):
        raise OptionError(f"--only {min(unknown)!r} is no model: {', '.join(ALL_MODELS)} are")
    return models


def parse_precision(text: str) -> Precision:
    if text not in list(Precision):
        raise OptionError(f"--precision {text!r} is not allowed: {' or '.join(Precision)}")
    return Precision(text)


def parse_prune(
    prune: str | None, models: list[str] | None, folder: Path | None
) -> PruneOptions | None:
    """`--prune` and `--save-pruned`, checked against `--only`."""
    if prune is None:
        if folder is not None:
            raise OptionError(f"--save-pruned {folder}: nothing is pruned without --prune")
        return None
    try:
        ratios = parse_ratios(prune)
    except ValueError as error:
        raise OptionError(str(error)) from error
    if models is not None and (left_out := set(ratios) - set(models)):
        raise OptionError(f"--prune {min(left_out)}: --only leaves it out")
    if folder is not None and not folder.parent.is_dir():
        raise OptionError(f"--save-pruned {folder}: {folder.parent} is no folder")
    return PruneOptions(ratios, folder)


def parse_serving(
    sampler: str | None,
    defaults: str | None,
    loras: Sequence[str] = (),
    lora_set: Sequence[str] = (),
    prediction_type: str | None = None,
) -> Serving:
    """What the options change of a checkpoint; of LoRA files only the keys are read.

    Raises:
        CheckpointError: a value or a file cannot be used.
    """
    given = parse_defaults(defaults or "")
    if sampler and given.get("sampler", sampler) != sampler:
        raise OptionError(f"--default sampler={given['sampler']}: --sampler is {sampler}")
    read = [read_lora(text) for text in loras]
    first: dict[str, Path] = {}
    for lora in read:
        if lora.sha256 in first:
            both = f"{first[lora.sha256]} and {lora.file}"
            raise OptionError(f"--lora is given twice for one content, {both}: add the scales")
        first[lora.sha256] = lora.file
    named = _parse_lora_set(lora_set, first)
    return Serving(sampler, given, tuple(read), named, prediction_type)


def _parse_lora_set(entries: Sequence[str], fused: Mapping[str, Path]) -> dict[str, Lora]:
    """LoRAs by name; none of them is among those that are fused."""
    named: dict[str, Lora] = {}
    for entry in entries:
        name, equals, file = entry.partition("=")
        if not equals or not LORA_NAME.fullmatch(name):
            raise OptionError(
                f"--lora-set {entry} is invalid: must be NAME=FILE, with a name of up to 64"
                " letters, digits, dots, - and _"
            )
        if name in named:
            raise OptionError(f"--lora-set {name} is named twice")
        lora = read_lora(file)
        if lora.scale != 1:
            raise OptionError(f"--lora-set {entry}: requests give the scale, as in {name}:0.8")
        if lora.sha256 in fused:
            raise OptionError(f"--lora-set {entry}: --lora fuses {fused[lora.sha256]}, the same")
        named[name] = lora
    if len(named) > MAX_LORAS:
        raise OptionError(f"--lora-set is given {len(named)} times: must be at most {MAX_LORAS}")
    return named


def check_report(report: Path | None) -> None:
    """Raises OptionError where the report cannot be written."""
    if report is None:
        return
    if not report.parent.is_dir():
        raise OptionError(f"--report {report}: {report.parent} is no folder")
    if report.is_dir():
        raise OptionError(f"--report {report} is a folder: name a file")
    if not os.access(report if report.exists() else report.parent, os.W_OK):
        raise OptionError(f"--report {report} cannot be written")


@contextmanager
def stop_on_error(repository: Path) -> Iterator[None]:
    """Ends the command with one sentence instead of a traceback, and keeps libraries quiet."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        yield
        return
    except (OptionError, *FAILURES) as error:
        reason = str(error)
    except OSError as error:
        reason = f"cannot write into {repository}: {error.strerror or error}"
    except typer.Exit:
        raise
    except Exception as error:  # a fault of the export, of which users still get one sentence
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {first_line(error)}"
        reason += f" ({Path(place.filename).name}, line {place.lineno}); please report it"
    text = f"[red]export failed:[/] {escape(reason)}"
    console.print(text, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def export_checkpoint(options: Options, report: Path | None = None) -> None:
    """Opens, prunes, builds, gates and reports; the table also goes into `report`, as JSON.

    Raises:
        Each of `FAILURES`, and OSError where the repository cannot be written.
    """
    check_report(report)
    check_cpu_runtime(options.cpu_runtime)
    if options.prune and options.serving.lora_set:
        raise OptionError(
            "--lora-set cannot be combined with --prune: its factors have the shapes of layers"
            " that are not pruned; --lora fuses a LoRA before pruning"
        )
    trt = load_tensorrt() if options.tensorrt else None
    gc.freeze()  # collections pass over the many objects of libraries
    with ExitStack() as stack:
        status = stack.enter_context(console.status("opening the checkpoint"))
        opened, original = _open(options)
        stack.enter_context(opened.naming_its_file())
        _print_changes(opened)
        models = options.models or models_of(opened)
        if options.prune:
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            check_machine(
                opened, options.repository, models, options.precision, [*options.prune.ratios]
            )
            opened = prune_checkpoint(
                opened, options.prune.ratios, options.prune.folder or Path(scratch, "pruned"),
                lambda model: status.update(f"pruning {model}"),
            )  # fmt: skip
        gate = None
        if options.gate:
            optimised = _optimised(original, opened, models, options)
            gate = Gate(original, optimised, options.repository, options.gate.measure)
        reports = build(
            opened, options.repository, lambda model: status.update(f"exporting {model}"),
            models, options.precision, trt, gate, options.cpu_runtime,
        )  # fmt: skip
    if report is not None:
        lines = [asdict(line) for line in reports]
        report.write_text(json.dumps(lines, indent=2) + "\n")
    console.print(_table(opened.name, reports))
    for line in reports:
        if line.cpu_runtime is not None:
            text = line.cpu_runtime.describe(line.model)
            console.print(text, highlight=False, soft_wrap=True, markup=False)
    if gate is not None:
        console.print(f"the gate passes: {gate.summary}", highlight=False, soft_wrap=True)
    console.print(f"{options.repository} serves {opened.name} now")


def _print_changes(opened: Checkpoint) -> None:
    """Says what is served otherwise than the checkpoint's files say, and what is a guess."""
    serving, lines = opened.serving, []
    if serving.sampler:
        unused = pipeline.unused_scheduler_options(opened)
        listed = ", ".join(f"{name}={value!r}" for name, value in unused.items())
        line = f"--sampler {serving.sampler} replaces {opened.classes['scheduler']}"
        lines.append(line + (f"; not used: {listed}" if listed else ""))
    if serving.prediction_type:
        lines.append(f"--prediction-type: the UNet is taken to predict {serving.prediction_type}")
    for lora in serving.loras:
        parts = " and ".join(lora.parts)
        lines.append(f"{lora.file.name} is fused into {parts} with scale {lora.scale:g}")
    for name, lora in serving.lora_set.items():
        lines.append(f"{lora.file.name} is {name!r} of requests' lora")
    lines += [f"guessed: {guess}" for guess in opened.guesses]
    if guessed := pipeline.guessed_defaults(opened):
        words = {"steps": "{} steps", "guidance_scale": "guidance_scale {}"}
        listed = ", ".join(words[name].format(value) for name, value in guessed.items())
        lines.append(f"guessed: {listed}; set them with --default")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _open(options: Options) -> tuple[Checkpoint, Checkpoint]:
    """The checkpoint to export, and the one that the gate compares with.

    Raises:
        CheckpointError: one cannot be opened, or the gate has only a pruned one.
    """
    gate = options.gate
    against = gate.against if gate else None
    # A pruned checkpoint has the text model that --bert gives to its original.
    opened = open_checkpoint(options.source, keep_bert=against is not None, serving=options.serving)
    if against is not None:
        source = replace(
            options.source, checkpoint=against, revision=None, subfolder=None, variant=None
        )
        original = open_checkpoint(source, serving=options.serving)
        _check_same_loras(opened, original)
        return opened, original
    pruned = [
        name
        for name, part in SOURCE.items()
        if part in opened.folders and pruning_of(opened.folders[part])
    ]
    if gate and pruned:
        text = f"{opened.name} has {', '.join(pruned)} pruned"
        raise CheckpointError(f"--gate needs --gate-against, the unpruned checkpoint: {text}")
    return opened, opened


def _check_same_loras(opened: Checkpoint, original: Checkpoint) -> None:
    """Raises CheckpointError where the gate would measure a LoRA."""
    for part in original.folders:
        theirs = [record["sha256"] for record in original.loras_of(part)]
        for record in opened.loras_of(part):
            if record["sha256"] not in theirs:
                raise CheckpointError(
                    f"--gate-against {original.name} lacks the LoRA {record['file']} of"
                    f" {opened.name}: --lora {record['file']}:{record['scale']:g} fuses it"
                )


def _optimised(
    original: Checkpoint, opened: Checkpoint, models: Sequence[str], options: Options
) -> Sequence[str]:
    """Models that are not what a plain export of `original` makes.

    Raises:
        CheckpointError: there is none.
    """
    if options.precision is not Precision.FP32:
        return models
    rerun = MEASURED if options.cpu_runtime is not CpuRuntime.ONNXRUNTIME else ()
    optimised = [
        name
        for name, part in SOURCE.items()
        if name in models
        and (
            name in rerun or pruning_of(opened.folders[part]) != pruning_of(original.folders[part])
        )
    ]
    if not optimised:
        raise CheckpointError(
            "--gate has nothing to compare: no model is optimised;"
            " --gate-against names the unpruned checkpoint of a pruned one"
        )
    return optimised


def _table(name: str, reports: list[ModelReport]) -> Table:
    table = Table(title=f"{name}, against PyTorch", title_justify="left")
    for heading in ("model", "weights", "MACs", "MB", "type", "nodes", "error", "s"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for r in reports:
        table.add_row(
            r.model, _millions(r.parameters, r.pruning and r.pruning.parameters),
            _millions(r.macs, r.pruning and r.pruning.macs), f"{r.bytes / 1e6:.1f}", r.precision,
            str(r.nodes), f"{r.error:.1e}", f"{r.seconds:.1f}",
        )  # fmt: skip
    return table


def _millions(count: int, pruned: tuple[int, int] | None) -> str:
    """A count in millions, and its change by pruning."""
    change = f" ({100 * (pruned[1] / pruned[0] - 1):+.0f}%)" if pruned else ""
    return f"{count / 1e6:.2f} M{change}"
