"""`python -m benchmarks.fullsize`: an 860M UNet, from checkpoint to pictures, on a small machine.

Random weights of LCM-Dreamshaper's exact configuration are exported, served by the embedded
server, compared with diffusers' own pipeline, halved and compiled. Every stage runs in processes
of its own, whose time and peak memory are written down.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from benchmarks import fullsize_stages as stages
from benchmarks import fullsize_xl
from benchmarks.machine import write_result
from benchmarks.process_memory import Usage, watch
from export.resources import free_memory

GOALS = {"export_peak_gb": 12, "serve_peak_gb": 10, "unet_export_seconds": 180, "difference": 2}
DISK, MEMORY = 20e9, 12e9  # bytes that must be free
TARGET = "SM89"


def main(
    folder: Annotated[
        Path, typer.Option(help="Where the folders of the run go; they are removed afterwards.")
    ] = Path("/tmp"),
    family: Annotated[
        str, typer.Option(help="lcm, or sdxl: its exact size in FP16, one picture at 512x512.")
    ] = "lcm",
    note: Annotated[str, typer.Option(help="On the machine, for the result file.")] = "",
    out: Annotated[Path | None, typer.Option(help="Result file; default: of the family.")] = None,
) -> None:
    """Exports, serves and compiles a checkpoint of full size."""
    if family not in ("lcm", "sdxl"):
        typer.echo(f"--family {family!r} is invalid: must be lcm or sdxl", err=True)
        raise typer.Exit(1)
    xl = family == "sdxl"
    for what, free, needed in (
        (f"disk at {folder}", shutil.disk_usage(folder).free, fullsize_xl.DISK if xl else DISK),
        ("memory", free_memory(), fullsize_xl.MEMORY if xl else MEMORY),
    ):
        if free < needed:
            typer.echo(
                f"not enough {what}: {needed / 1e9:.0f} GB are needed,"
                f" {free / 1e9:.1f} GB are free", err=True,
            )  # fmt: skip
            raise typer.Exit(1)
    if xl:
        with tempfile.TemporaryDirectory(prefix="fullsize-", dir=folder) as scratch:
            summary, stages_used, models = run_xl(Path(scratch))
        write_result(
            out or Path("benchmarks/results/fullsize_sdxl.json"),
            "python -m benchmarks.fullsize", note=note, goals=fullsize_xl.GOALS,
            summary=summary, stages=stages_used, models=models,
        )  # fmt: skip
        print(json.dumps(summary))
        return
    out = out or Path("benchmarks/results/fullsize.json")
    with tempfile.TemporaryDirectory(prefix="fullsize-", dir=folder) as scratch:
        used, models, serving, difference = run(Path(scratch))
    summary = {
        "export_peak_gb": used["export"].peak_gb,
        "serve_peak_gb": used["serve"].peak_gb,
        "unet_export_seconds": next(m["seconds"] for m in models if m["model"] == "unet"),
        "difference": difference,
    }
    write_result(
        out, "python -m benchmarks.fullsize", note=note, goals=GOALS, summary=summary,
        stages={name: asdict(usage) for name, usage in used.items()}, models=models,
        serving_seconds=serving,
    )  # fmt: skip
    print(json.dumps(summary))


def run(folder: Path) -> tuple[dict[str, Usage], list[dict], dict[str, float], int]:
    """Every stage, in `folder`.

    Returns:
        What each took, the reports of the exported models, the seconds until the server was
        ready and of one picture, and the largest difference of the picture to diffusers', of 255.
    """
    checkpoint, bert, repository = (folder / name for name in ("lcm", "bert", "model_repository"))
    ignore = shutil.ignore_patterns("*.onnx*", "*.json", "*.plan", "configs", "__pycache__")
    shutil.copytree("model_repository", repository, ignore=ignore)
    report, theirs = folder / "report.json", folder / "theirs.npy"
    export = [
        sys.executable, "-m", "export", str(checkpoint), "--bert", str(bert),
        "--repository", str(repository), "--report", str(report),
    ]  # fmt: skip
    used = {"make": _in_process(stages.make_checkpoint, checkpoint, bert)}
    used["export"], _ = _command(export)
    models = json.loads(report.read_text())
    used["serve"], serving = _serve(repository, folder)
    used["diffusers"] = _in_process(stages.paint_with_diffusers, checkpoint, theirs)
    used["export_unet_fp16"], _ = _command([*export, "--only", "unet", "--precision", "fp16"])
    models += json.loads(report.read_text())
    used["compile_unet_fp16"] = _in_process(
        stages.compile_unet, repository, folder / "plans", TARGET
    )
    (ours,) = (folder / "pictures").glob("*.png")
    pixels = np.asarray(Image.open(ours)).astype(int)
    return used, models, serving, int(np.abs(pixels - np.load(theirs)).max())


def run_xl(folder: Path) -> tuple[dict[str, float], dict[str, dict], list[dict]]:
    """SDXL's exact size with random weights in FP16: export, and one picture at 512x512.

    Returns:
        The summary, what each stage took, and the reports of the exported models.
    """
    checkpoint, repository = folder / "sdxl", folder / "model_repository"
    ignore = shutil.ignore_patterns("*.onnx*", "*.json", "*.plan", "configs", "__pycache__")
    shutil.copytree("model_repository", repository, ignore=ignore)
    report = folder / "report.json"
    used = {"make": _in_process(fullsize_xl.make_checkpoint, checkpoint)}
    used["export"], _ = _command([
        sys.executable, "-m", "export", str(checkpoint), "--repository", str(repository),
        "--precision", "fp16", "--report", str(report),
    ])  # fmt: skip
    shutil.rmtree(checkpoint)  # the disk is small
    used["serve"], seconds = _serve(
        repository, folder, side=fullsize_xl.SIDE, steps=fullsize_xl.STEPS
    )
    summary = {
        "export_peak_gb": used["export"].peak_gb,
        "serve_peak_gb": used["serve"].peak_gb,
        "ready_seconds": seconds["ready"],
        "picture_seconds": seconds["picture"],
    }
    stages_used = {name: asdict(usage) for name, usage in used.items()}
    return summary, stages_used, json.loads(report.read_text())


def _serve(
    repository: Path, folder: Path, side: int = stages.SIDE, steps: int = stages.STEPS
) -> tuple[Usage, dict[str, float]]:
    """Paints one picture through the embedded server into `folder/pictures`."""
    generate = [
        "twinbrush", "generate", stages.PROMPT, "--seed", stages.SEED, "--steps", steps,
        "--guidance-scale", stages.GUIDANCE, "--width", side, "--height", side,
        "--out", folder / "pictures",
    ]  # fmt: skip
    usage, said = _command([
        sys.executable, "-m", "twinbrush.server", "--repository", str(repository),
        "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0",
        "--then", shlex.join(map(str, generate)),
    ])  # fmt: skip
    (ready,) = re.findall(r"ready in ([\d.]+) s", said)
    (milliseconds,) = re.findall(r"in (\d+) ms", said)
    return usage, {"ready": float(ready), "picture": int(milliseconds) / 1000}


def _command(command: list[str]) -> tuple[Usage, str]:
    """Runs a command; gives what it took and what it said.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with watch(process.pid) as usage:
        said, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{said}")
    return usage, said


def _in_process(stage: Callable, *arguments: object) -> Usage:
    """Runs a function in a process of its own.

    Raises:
        RuntimeError: it failed; its traceback is on stderr.
    """
    process = multiprocessing.get_context("spawn").Process(target=stage, args=arguments)
    process.start()
    assert process.pid is not None
    with watch(process.pid) as usage:
        process.join()
    if process.exitcode:
        raise RuntimeError(f"{stage.__name__} failed")
    return usage


if __name__ == "__main__":
    typer.run(main)
