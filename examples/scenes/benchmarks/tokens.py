"""`python -m examples.scenes.benchmarks.tokens`: what a linear probe reads from text tokens.

The probe (arXiv:1610.01644) is trained on frozen tokens: from the last word of an object's name it
predicts what the object is, where it stands and beside what. A UNet reads its prompt from these
tokens, so it has to work out by itself what a probe cannot read. Probed are CLIP, BERT, the output
of the checkpoint's head, and a BERT of masked words alone, which is trained first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks.machine import write_result
from examples.scenes.benchmarks.fusion import Arm, with_masked_words
from examples.scenes.grounding import Questions, word_answers
from examples.scenes.quality import NAMES, tasks
from examples.scenes.scenes import Scene
from examples.scenes.world import captions, draw_scenes
from export.checkpoint import open_checkpoint
from networks.fusion_head import FusionHead
from networks.loading import CheckpointError
from training import data
from training.cli import pick_device
from training.losses import IGNORED

CAPTIONS, LEARNING_RATE = 64, 3e-3  # a step
FIRST_SEED = 70_000_000  # of the probe's captions
console = Console()
Head = Callable[[Tensor, Tensor, Tensor], Tensor]  # an arm's inputs to tokens (B, L, width)


def main(
    checkpoint: Annotated[Path, typer.Option(help="Whose encoders are probed.")] = Path(
        "checkpoints/scenes-64"
    ),
    runs: Annotated[
        Path, typer.Option(help="Folder of saves, shared with examples.scenes.benchmarks.fusion.")
    ] = Path("runs/fusion"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each probe.")] = 600,
    n: Annotated[int, typer.Option(min=3, help="Held-out prompts.")] = 1000,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    bf16: Annotated[bool, typer.Option(help="bfloat16 products in BERT's training.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 takes all.")] = 0,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path(
        "examples/scenes/results/tokens.json"
    ),
) -> None:
    """Trains a probe for each encoder, and counts its right answers on held-out prompts."""
    if threads:
        torch.set_num_threads(threads)
    results: dict[str, dict[str, Any]] = {}
    try:
        opened, on = open_checkpoint(checkpoint), pick_device(device)
        masked = with_masked_words(checkpoint, runs / "masked-words", on, bf16)
        head = opened.load("fusion", FusionHead).requires_grad_(False).to(on)
        for name, arm, folder, merge in (
            ("clip", "clip", checkpoint, stream),
            ("bert_of_masked_words", "bert", masked, stream),
            ("bert", "bert", checkpoint, stream),
            ("fused", "fusion", checkpoint, head),
        ):
            results[name] = probed(Arm(folder, arm, on), merge, steps, n)
            console.print(f"{name}: {json.dumps(results[name]['all'])}")
    except (CheckpointError, data.BadInput) as error:
        sys.exit(f"error: {error}")
    write_result(
        out, "python -m examples.scenes.benchmarks.tokens", checkpoint=opened.name, steps=steps,
        n=n, results=results,
    )  # fmt: skip
    print(json.dumps({name: found["all"] for name, found in results.items()}))


def stream(tokens: Tensor, layers: Tensor, mask: Tensor) -> Tensor:
    """A head that merges nothing."""
    return tokens


def probed(encoders: Arm, head: Head, steps: int, n: int) -> dict[str, dict[str, float]]:
    """Percent of right answers to each question, by number of objects."""
    probe = trained_probe(encoders, head, steps)
    scenes, texts = zip(*((task.scene, task.prompt) for task in tasks(n)), strict=True)
    answers = last_words(answers_of(encoders, list(texts), scenes))
    hidden = head(*encoders(list(texts)))
    count = torch.tensor([len(scene.items) for scene in scenes], device=hidden.device)
    rows = {name: count == k for k, name in NAMES.items()} | {"all": count > 0}
    return {
        name: {
            question: round(100 * accuracy.item(), 1)
            for question, accuracy in probe.losses(hidden[row], answers[row])[1].items()
        }
        for name, row in rows.items()
    }


def trained_probe(encoders: Arm, head: Head, steps: int) -> Questions:
    torch.manual_seed(0)
    probe = Questions(head(*encoders([""])).shape[-1]).to(encoders.device)
    optimizer = torch.optim.AdamW(probe.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in track(range(steps), "probing", console=console, transient=True):
        scenes, rng = draw_scenes(FIRST_SEED + step, CAPTIONS)
        texts = captions(scenes, rng)
        hidden = head(*encoders(texts))
        loss, _ = probe.losses(hidden, last_words(answers_of(encoders, texts, scenes)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return probe


def answers_of(encoders: Arm, texts: list[str], scenes: Sequence[Scene]) -> Tensor:
    """The answers of an arm's stream of tokens, (B, L, questions)."""
    return word_answers(encoders.stream_tokenizer, texts, scenes).to(encoders.device)


def last_words(answers: Tensor) -> Tensor:
    """Answers (B, L, questions) of the last token of every name alone.

    CLIP reads from left to right: a word knows nothing of those after it.
    """
    named = answers[..., :1] != IGNORED
    following = torch.cat([named[:, 1:], torch.zeros_like(named[:, :1])], dim=1)
    return answers.masked_fill(following, IGNORED)


if __name__ == "__main__":
    typer.run(main)
