"""The command line: `python -m export CHECKPOINT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from export.checkpoint import PREDICTION_TYPES
from export.command import (
    GateOptions,
    OptionError,
    Options,
    check_report,
    export_checkpoint,
    parse_models,
    parse_precision,
    parse_prune,
    parse_serving,
    stop_on_error,
)
from export.cpu_runtime import CpuRuntime
from export.gate import LEAST_PSNR, PROMPTS, psnr
from export.precision import Precision
from export.repository import ALL_MODELS
from export.source import Source, check_source


def main(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Folder or hub id of a checkpoint in diffusers layout, or one .safetensors file."
        ),
    ],
    repository: Annotated[Path, typer.Option(help="Model repository to build into.")] = Path(
        "model_repository"
    ),
    bert: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of a text model, for a checkpoint without one; with"
            " --gate-against, a text model of CHECKPOINT's own is kept."
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Commit, tag or branch, where CHECKPOINT is a hub id.")
    ] = None,
    bert_revision: Annotated[
        str | None, typer.Option(help="Commit, tag or branch, where --bert is a hub id.")
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(help="Weights to read, as in fp16 for *.fp16.safetensors files."),
    ] = None,
    subfolder: Annotated[
        str | None, typer.Option(help="Folder inside CHECKPOINT that holds the checkpoint.")
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            help="Another autoencoder to decode with: folder, hub id or .safetensors file."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of CLIP's tokenizer; a single file has none."),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="LoRA to fuse, FILE or FILE:SCALE in safetensors; can be repeated."),
    ] = None,
    lora_set: Annotated[
        list[str] | None,
        typer.Option(help="LoRA that requests switch on, NAME=FILE; can be repeated."),
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="Sampler in place of the checkpoint's scheduler.")
    ] = None,
    prediction_type: Annotated[
        str | None,
        typer.Option(
            help=f"What the UNet predicts, whatever the files say: {', '.join(PREDICTION_TYPES)}."
        ),
    ] = None,
    default: Annotated[
        str | None,
        typer.Option(help="Defaults of requests, as in steps=1,guidance_scale=0,sampler=euler_a."),
    ] = None,
    clip_skip: Annotated[
        int,
        typer.Option(
            min=0, help="Layers of CLIP to skip, counted as in diffusers: A1111's number minus 1."
        ),
    ] = 0,
    only: Annotated[
        str | None,
        typer.Option(help=f"Models to rebuild, with commas: {', '.join(ALL_MODELS)}."),
    ] = None,
    precision: Annotated[
        str, typer.Option(help=f"Precision of the models: {' or '.join(Precision)}.")
    ] = Precision.FP32.value,
    tensorrt: Annotated[
        bool, typer.Option("--tensorrt", help="Build TensorRT plans too, for this machine.")
    ] = False,
    cpu_runtime: Annotated[
        CpuRuntime,
        typer.Option(help="What computes unet and decoder on a CPU; auto measures it here."),
    ] = CpuRuntime.ONNXRUNTIME,
    prune: Annotated[
        str | None,
        typer.Option(help="Share of MACs to remove by model, as in unet=0.3,clip_text=0.25."),
    ] = None,
    save_pruned: Annotated[
        Path | None, typer.Option(help="Keeps the pruned checkpoint in this new folder.")
    ] = None,
    gate: Annotated[
        bool, typer.Option("--gate", help="Refuses when pictures of optimised models differ.")
    ] = False,
    gate_against: Annotated[
        str | None,
        typer.Option(help="Unoptimised checkpoint, where CHECKPOINT is a pruned one."),
    ] = None,
    gate_psnr: Annotated[
        float, typer.Option(min=0, help="dB that pictures must reach against the unoptimised.")
    ] = LEAST_PSNR,
    gate_prompts: Annotated[
        int | None, typer.Option(min=1, help=f"Prompts to paint; default: {len(PROMPTS)}.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Writes the table into this file, as JSON.")
    ] = None,
) -> None:
    """Exports a checkpoint into a Triton model repository.

    Takes any checkpoint of CLIP, UNet and VQGAN or VAE, SDXL's two CLIP towers included. Where
    --bert names a text model, a fusion head that changes nothing yet is added.

    Every model is compared with its PyTorch original. With --gate, pictures of the optimised
    models are compared with those of the unoptimised. When anything fails, the repository
    stays as it was.
    """
    with stop_on_error(repository):
        models = parse_models(only)
        check_report(report)
        source = Source(
            checkpoint, revision, subfolder, variant, bert, bert_revision, vae, tokenizer,
            clip_skip,
        )  # fmt: skip
        check_source(source)
        limits = (gate_against, gate_psnr, gate_prompts)
        if not gate and limits != (None, LEAST_PSNR, None):
            raise OptionError(
                "--gate-against, -psnr and -prompts say what --gate does: --gate is not given"
            )
        options = Options(
            source,
            repository,
            models,
            parse_precision(precision),
            tensorrt,
            parse_prune(prune, models, save_pruned),
            GateOptions(psnr(gate_psnr, gate_prompts), gate_against) if gate else None,
            parse_serving(sampler, default, lora or [], lora_set or [], prediction_type),
            cpu_runtime,
        )
        export_checkpoint(options, report)


if __name__ == "__main__":
    typer.run(main)
