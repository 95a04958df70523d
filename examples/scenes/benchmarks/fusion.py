"""`python -m examples.scenes.benchmarks.fusion`: CLIP and BERT fused against each alone.

Three UNets with the same head are trained to the same budget on the same batches, anew for
each seed; only what the head merges differs: CLIP tokens that attend to CLIP's own inner
layers, BERT tokens that attend to BERT's, and CLIP tokens that attend to BERT's. So every
arm has as many parameters and looks at as many layers; CLIP's own are seen whole, with the
padding that Stable Diffusion's UNet sees too, BERT's without padding. Held-out prompts are then
painted from the same noise and read back. The encoders are the checkpoint's: the BERT of
`scenes-64` was trained on the scenes' objective and its CLIP was not, which is part of what is
compared; `--masked-words` takes a BERT of masked words alone. With `--init` the UNets can paint
before they learn to read. Learning rate, timesteps and guidance were chosen on the fusion. Each
training continues from its last save.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from diffusers import UNet2DConditionModel, VQModel
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from benchmarks.machine import write_result
from examples.scenes.benchmarks.steps import points_lost
from examples.scenes.quality import NAMES, Score, Task, read, score, table_of, tasks
from examples.scenes.world import SceneWorld, world_for
from export.checkpoint import open_checkpoint
from networks.loading import CheckpointError, load_part
from training import bert, data
from training.cli import pick_device
from training.diffusion import (
    BERT_LAYERS,
    DEFAULTS,
    EMA_DECAY,
    FROZEN,
    LEARNING_RATE,
    Encoders,
    Painter,
    scheduler,
    velocity_loss,
)
from training.run import Run, starting_from
from training.sampling import sample
from training.sheets import pixels_of

ARMS = ("clip", "bert", "fusion")
AT_ONCE = 100  # pictures
MASKED_WORDS_STEPS = 1200  # of the BERT of masked words alone
console = Console()


class Arm(Encoders):
    """The inputs of one arm's head: a stream of tokens, the layers it attends to, their mask."""

    def __init__(self, checkpoint: Path, arm: str, device: torch.device):
        super().__init__(checkpoint, device)
        self.arm = arm

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        if self.arm == "fusion":
            return super().__call__(texts)
        if self.arm == "bert":  # its last hidden state is the last of these layers
            layers, mask = self.bert_layers(texts)
            return layers[:, -1], layers, mask
        tokens, states = self.clip_states(texts)
        layers = torch.stack([states[i] for i in BERT_LAYERS], dim=1)
        mask = torch.ones(layers.shape[0], layers.shape[2], dtype=torch.int64, device=self.device)
        return tokens, layers, mask

    @property
    def stream_tokenizer(self) -> PreTrainedTokenizerBase:
        return self.bert_tokenizer if self.arm == "bert" else self.tokenizer


def main(
    checkpoint: Annotated[Path, typer.Option(help="Whose encoders and VQGAN are used.")] = Path(
        "checkpoints/scenes-64"
    ),
    runs: Annotated[Path, typer.Option(help="Folder of saves.")] = Path("runs/fusion"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each UNet.")] = 6000,
    batch: Annotated[int, typer.Option(min=1, help="Scenes a step.")] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each arm.")] = 2,
    channels: Annotated[
        int,
        typer.Option(help="Of each UNet's first level, a multiple of 32; the second has twice."),
    ] = 96,
    init: Annotated[
        Path | None,
        typer.Option(
            help="Undistilled checkpoint whose UNet every arm starts from, of --channels, with "
            "attention to text that is drawn anew; without it all is."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    bf16: Annotated[bool, typer.Option(help="bfloat16 products in training.")] = False,
    masked_words: Annotated[
        bool,
        typer.Option(help="A BERT of masked words alone, trained first, for the checkpoint's."),
    ] = False,
    arm: Annotated[
        list[str], typer.Option(help=f"Arm to train, of {', '.join(ARMS)}; repeatable.")
    ] = list(ARMS),  # noqa: B006
    n: Annotated[int, typer.Option(min=3, help="Held-out prompts.")] = 1000,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 takes all.")] = 0,
    out: Annotated[Path, typer.Option(help="Result file; the plot goes beside it.")] = Path(
        "examples/scenes/results/fusion.json"
    ),
) -> None:
    """Trains and measures CLIP alone, BERT alone, and both fused."""
    if threads:
        torch.set_num_threads(threads)
    if channels < 1 or channels % 32:
        sys.exit(f"error: --channels: {channels} is not a multiple of 32")
    if unknown := set(arm) - set(ARMS):
        sys.exit(f"error: --arm: {', '.join(sorted(unknown))} is not one of {', '.join(ARMS)}")
    arms = [name for name in ARMS if name in arm]
    all_tasks = tasks(n)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    scores: dict[str, list[list[Score]]] = {name: [] for name in arms}
    try:
        opened, on = open_checkpoint(checkpoint), pick_device(device)
        vae = opened.load("vae", VQModel).to(on)
        if masked_words:
            checkpoint = with_masked_words(checkpoint, runs / "masked-words", on, bf16)
        source = world_for(on)
        folder = runs / f"{steps}x{batch}"
        run = Run(checkpoint, folder, steps, batch, on, bf16, save_every=500, source=source)
        batches = source.latents(checkpoint, runs, batch, on)
        for seed, name in itertools.product(range(seeds), arms):
            encoders, seeded = Arm(checkpoint, name, on), replace(run, seed=seed)
            torch.manual_seed(seed)
            painter = Painter(channels=channels, objective=source.objective)
            reads = [checkpoint / part for part in FROZEN]
            if init:
                start(painter.unet, init)
                reads.append(init / "unet")
            painter.to(on)
            trainer = seeded.trainer(painter, f"{name}-{seed}", LEARNING_RATE, EMA_DECAY, reads)
            first = seeded.first()
            loss_at = velocity_loss(painter, encoders, batches, first, source.objective)
            trained = trainer.run(loss_at, batches)
            learnt = cast(Painter, trained.eval())
            found = painted(learnt, encoders, vae, all_tasks, seed)
            scores[name].append(found)
            results[name].append(table_of(all_tasks, found))
            console.print(f"{name}, seed {seed}: {json.dumps(summary_of(results[name][-1:]))}")
    except (CheckpointError, data.BadInput) as error:
        sys.exit(f"error: {error}")
    summary: dict[str, Any] = {name: summary_of(tables) for name, tables in results.items()}
    fused = scores.pop("fusion", [])
    summary["behind_fusion"] = {  # of each seed: the intervals are over prompts alone
        name: [points_lost(*pair) for pair in zip(fused, found, strict=True)]
        for name, found in scores.items()
        if fused
    }
    write_result(
        out, "python -m examples.scenes.benchmarks.fusion", checkpoint=opened.name,
        steps=steps, batch=batch, seeds=seeds, channels=channels, init=init and init.name,
        masked_words=masked_words, n=n,
        summary=summary, results=results,
    )  # fmt: skip
    plot(results, out.with_suffix(".png"))
    print(json.dumps(summary))


def start(unet: UNet2DConditionModel, init: Path) -> None:
    """Gives a UNet all weights of a checkpoint's but those of its attention to text.

    Raises:
        BadInput: there is no UNet, or it has other tensors.
    """
    own = {key: value for key, value in unet.state_dict().items() if ".attn2." in key}
    with starting_from(init / "unet", "UNet"):
        weights = load_part(init / "unet", UNet2DConditionModel).state_dict()
        unet.load_state_dict(weights | own)


def with_masked_words(checkpoint: Path, folder: Path, device: torch.device, bf16: bool) -> Path:
    """A copy of a checkpoint, whose BERT was trained on masked words and nothing else."""
    copy, captions = folder / checkpoint.name, SceneWorld(with_truth=False)
    shutil.copytree(checkpoint, copy, dirs_exist_ok=True)
    bert.train(Run(copy, folder, MASKED_WORDS_STEPS, bert.BATCH, device, bf16, source=captions))
    return copy


@torch.no_grad()
def painted(
    painter: Painter, encoders: Arm, vae: VQModel, all_tasks: list[Task], seed: int
) -> list[Score]:
    """Scores of pictures that diffusers' sampler paints, of every arm from the same noise."""
    draw = torch.Generator().manual_seed(seed)
    empty = painter.fusion(*encoders([""]))
    scores = []
    for start in range(0, len(all_tasks), AT_ONCE):
        chunk = all_tasks[start : start + AT_ONCE]
        hidden = painter.fusion(*encoders([task.prompt for task in chunk]))
        latents = sample(painter.unet, hidden, empty, scheduler(), DEFAULTS, draw)
        latents = latents / vae.config["scaling_factor"]
        pixels = pixels_of(vae.decode(latents, return_dict=False)[0])
        scores += [score(task, read(p)) for task, p in zip(chunk, pixels, strict=True)]
    return scores


def summary_of(tables: list[dict[str, Any]]) -> dict[str, float | None]:
    """Means over trainings, in percent."""
    found = {name: [t[name]["all_correct"]["percent"] for t in tables] for name in NAMES.values()}
    found["colour_binding"] = [t["all"]["colour_binding"]["percent"] for t in tables]
    return {name: round(float(np.mean(values)), 1) for name, values in found.items()}


def plot(results: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Bars of the means, a dot for each training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    several = list(NAMES.values())[1:]
    panels = {"all_correct": [*NAMES.values(), "all"], "colour_binding": [*several, "all"]}
    for axes, (attribute, rows) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for k, (arm, tables) in enumerate(results.items()):
            values = np.array([[t[row][attribute]["percent"] for row in rows] for t in tables])
            x = np.arange(len(rows)) + 0.27 * (k - 1)
            axes.bar(x, values.mean(axis=0), width=0.25, label=arm)
            for row in values:
                axes.plot(x, row, "k.", markersize=4)
        axes.set_xticks(range(len(rows)), [row.replace("_", " ") for row in rows])
        axes.set(ylabel=f"{attribute.replace('_', ' ')}, %", ylim=(0, 100))
        axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    typer.run(main)
