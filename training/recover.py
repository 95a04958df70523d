"""`python -m training.recover`: a pruned checkpoint learns to match the unpruned one again.

Distillation (arXiv:1503.02531) of each pruned model by itself: it takes the unpruned model's inputs
and learns to give its outputs. The encoders take captions and match hidden states, the UNet noisy
latents at random timesteps, the decoder latents of pictures. They come from `--data`.
`python -m export --prune --save-pruned` makes the pruned checkpoint; its pruned parts are
overwritten.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, DDIMScheduler, VQModel
from torch import Tensor

from export.checkpoint import Checkpoint, open_checkpoint
from export.part import Part
from export.pipeline import defaults, native_side
from export.prune import save_part
from export.repository import SOURCE, load_parts
from export.tokenizer import load_tokenizer
from networks.loading import CheckpointError
from networks.pruned import pruning_of
from training import data
from training.captioned import Captioned
from training.cli import NO_DATA, pick_device
from training.latents import FIRST_DRAW, EncodedBatches, LatentBatch, encoded, noised
from training.preparation import Preparation
from training.run import Run, digest
from twinbrush.engine.guidance import guidance_embedding

LEARNING_RATE, EMA_DECAY = 3e-4, 0.99
HELD_OUT = 1_000_000  # the step whose captions and noise the distillation error is measured on


class Teacher:
    """The unpruned checkpoint: the inputs of its models at a step, and their outputs."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device = data.CPU):
        self._checkpoint, self.device = checkpoint, device
        self.parts = load_parts(checkpoint)
        for part in self.parts.values():
            part.module.requires_grad_(False).to(device)
        self._tokenizers = {
            name: load_tokenizer(checkpoint, name) for name in ("tokenizer", "bert_tokenizer")
        }
        schedule = DDIMScheduler.from_config(checkpoint.config("scheduler"))
        self._alphas_cumprod = schedule.alphas_cumprod.to(device)
        self._most_guidance = 2 * defaults(checkpoint)["guidance_scale"]

    def batches(self, run: Run, model: str, first: int = 0) -> data.Batches:
        """`LatentBatch`es of a run's source, in an order of the draws from `first`.

        Raises:
            BadInput: the teacher cannot encode the source's pictures.
        """
        checkpoint = self._checkpoint.folders["vae"].parent
        kept = run.source.latents(checkpoint, run.runs, run.batch, self.device)
        if kept is not None:
            return kept
        texts_alone = model in ("clip_text", "bert")
        drawn = run.source.batches(FIRST_DRAW + first, run.batch, self.device, texts_alone)
        return EncodedBatches(lambda pictures: encoded(self._vae, pictures), drawn)

    @cached_property
    def _vae(self) -> VQModel | AutoencoderKL:
        """With its encoder, which is not served; loaded when pictures are encoded."""
        vae_class = getattr(diffusers, self._checkpoint.classes["vae"])
        return self._checkpoint.load("vae", vae_class).to(self.device)

    @torch.no_grad()
    def inputs(self, model: str, batch: LatentBatch, step: int) -> dict[str, Tensor]:
        """A model's inputs for a batch: the same for the same step."""
        x0, rng, texts = batch.latents, batch.rng, batch.dropped()
        match model:
            case "clip_text":
                return self._clip_inputs(texts)
            case "bert":
                return self._bert_inputs(texts)
            case "vqgan_decoder":
                return {"latent": x0}
        draw = torch.Generator().manual_seed(step)
        t = torch.randint(len(self._alphas_cumprod), (len(x0),), generator=draw).to(self.device)
        noise = torch.randn(x0.shape, generator=draw).to(self.device)
        x_t = noised(x0, noise, self._alphas_cumprod[t])
        hidden = self._fused(texts)
        inputs = {"sample": x_t, "timestep": t, "encoder_hidden_states": hidden}
        if embedding := self.parts["unet"].inputs.get("timestep_cond"):
            scales = rng.uniform(1, self._most_guidance, size=len(x0))
            rows = [guidance_embedding(scale, embedding.axes[0]) for scale in scales]
            inputs["timestep_cond"] = torch.from_numpy(np.stack(rows)).to(self.device)
        return inputs

    def _fused(self, texts: list[str]) -> Tensor:
        bert_inputs = self._bert_inputs(texts)
        return self.parts["fusion"].module(
            clip_tokens=self.parts["clip_text"].module(**self._clip_inputs(texts)),
            bert_tokens=self.parts["bert"].module(**bert_inputs),
            attention_mask=bert_inputs["attention_mask"],
        )

    def _clip_inputs(self, texts: list[str]) -> dict[str, Tensor]:
        return {"input_ids": self._tokens("tokenizer", "clip_text", texts)["input_ids"]}

    def _bert_inputs(self, texts: list[str]) -> dict[str, Tensor]:
        encoded = self._tokens("bert_tokenizer", "bert", texts)
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def _tokens(self, tokenizer: str, model: str, texts: list[str]) -> dict[str, Tensor]:
        length = self.parts[model].inputs["input_ids"].axes[0]
        encoded = self._tokenizers[tokenizer](
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return encoded.to(self.device)

    def error(self, part: Part, inputs: dict[str, Tensor]) -> Tensor:
        """Squared error of a model against its original, as a share of the original's square."""
        with torch.no_grad():
            wanted = self.parts[part.name].module(**inputs).float()
        output = part.module(**inputs).float()
        return (output - wanted).square().mean() / wanted.square().mean()


def recover(
    run: Run, teacher: Path, models: list[str] | None = None, bert: str | None = None
) -> dict[str, tuple[float, float]]:
    """Trains the pruned models of the run's checkpoint, or those named, and writes them back.

    Args:
        bert: folder or hub id of the teacher's text model, as in the export that pruned it.

    Returns:
        the distillation error of each, before and after.

    Raises:
        ValueError: a checkpoint cannot be opened, a model is not pruned, or the data cannot be
            used.
    """
    opened, original = open_checkpoint(run.checkpoint), open_checkpoint(teacher, bert)
    models = _pruned(opened, original, models)
    parts = load_parts(opened)
    lessons = Teacher(original, run.device)
    errors, recovered = {}, []
    for name in models:
        part = parts[name]
        part.module.to(run.device)
        with closing(lessons.batches(run, name, HELD_OUT)) as measured:
            held_out = lessons.inputs(name, measured.at(HELD_OUT), HELD_OUT)
        with torch.no_grad():
            before = lessons.error(part, held_out).item()
        batches = lessons.batches(run, name)

        def loss_at(step: int, part: Part = part, batches: Any = batches) -> dict[str, Tensor]:
            given = lessons.inputs(part.name, batches.at(step), step)
            return {"loss": lessons.error(part, given)}

        place = opened.folders[SOURCE[name]]
        # Named by the weights that it starts from: never continues from another's save.
        folder = f"recover-{name}-{digest([place])[:12]}"
        reads = [original.folders[SOURCE[name]]]
        trainer = run.trainer(part.module, folder, LEARNING_RATE, EMA_DECAY, reads)
        trained = replace(part, module=trainer.run(loss_at, batches))
        with torch.no_grad():
            errors[name] = (before, lessons.error(trained, held_out).item())
        recovered.append((trained, pruning_of(place), place))
    for item in recovered:  # all at the end: the weights that a model starts from name its save
        save_part(opened, *item)
    return errors


def _pruned(opened: Checkpoint, original: Checkpoint, models: list[str] | None) -> list[str]:
    pruned = [
        name
        for name, part in SOURCE.items()
        if part in opened.folders and pruning_of(opened.folders[part])
    ]
    if not pruned:
        raise CheckpointError(f"{opened.name} has no pruned model to recover")
    for name in models or pruned:
        if name not in pruned:
            raise CheckpointError(f"--models {name!r} is not pruned: {', '.join(pruned)} are")
        if pruning_of(original.folders[SOURCE[name]]):
            raise CheckpointError(f"--teacher {original.name}: its {name} is pruned too")
    return models or pruned


def command(world: Callable[[torch.device], data.Source] | None = None) -> Callable[..., None]:
    """The command; without `--data` it trains on `world`, or requires `--data` if there is none."""

    def main(
        checkpoint: Annotated[Path, typer.Option(help="Pruned checkpoint folder to write.")],
        teacher: Annotated[Path, typer.Option(help="The unpruned checkpoint.")],
        bert: Annotated[
            str | None,
            typer.Option(help="Folder or hub id of the teacher's text model, if it has none."),
        ] = None,
        models: Annotated[
            str | None, typer.Option(help="Models to recover, with commas; all that are pruned.")
        ] = None,
        runs: Annotated[Path, typer.Option(help="Folder of saves and loss curves.")] = Path("runs"),
        steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each model.")] = 2000,
        batch: Annotated[int, typer.Option(min=1, help="Captions or pictures a step.")] = 64,
        path: Annotated[
            Path | None,
            typer.Option(
                "--data",
                help="Pictures like those that the teacher was trained on: a folder of pictures"
                " and captions, WebDataset tars, or parquet with COYO-700M's columns.",
            ),
        ] = None,
        side: Annotated[
            int | None, typer.Option(help="Of --data's pictures in pixels: the teacher's own.")
        ] = None,
        device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
        bf16: Annotated[
            bool,
            typer.Option(help="bfloat16 products; pays on GPUs, on CPUs with AMX or AVX512-BF16."),
        ] = False,
        threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 takes all.")] = 0,
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        names = [name.strip() for name in models.split(",")] if models else None
        try:
            chosen = pick_device(device)
            if path is not None:
                side = side or native_side(open_checkpoint(teacher, bert))
                source: data.Source = Captioned(path, Preparation(side))
            elif world is not None:
                source = world(chosen)
            else:
                raise data.BadInput(NO_DATA)
            run = Run(checkpoint, runs, steps, batch, chosen, bf16, source=source)
            errors = recover(run, teacher, names, bert)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        for name, (before, after) in errors.items():
            print(f"{name}: distillation error {before:.5f} -> {after:.5f}")
        print(json.dumps(errors))

    main.__doc__ = inspect.getdoc(sys.modules[__name__])
    return main


if __name__ == "__main__":
    typer.run(command())
