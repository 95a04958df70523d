"""`python -m examples.scenes.refit`: behind other encoders the fusion head says what it said before.

A UNet knows its text by the fusion head's tokens alone. Where CLIP or BERT was trained anew, the
head of `--init`, the checkpoint as it was, learns to give behind the new encoders what it gives
behind its own (distillation, arXiv:1503.02531); the UNet needs no training. Of scenes the captions
leave out what training shows in one size alone: what the old encoders concluded from such kinds is
not to be learnt again. Writes `fusion/`, and that of the teacher that the checkpoint was distilled
from, where the two had the same head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.scenes.scenes import names_one_sized
from networks.fusion_head import FusionHead
from networks.loading import load_part
from training.cli import stage_cli
from training.data import BadInput, knows_truth, requests_of
from training.diffusion import Encoders
from training.distill import teacher_folder
from training.run import Run, check_trained, digest, save_part

STEPS, BATCH = 2000, 96
LEARNING_RATE, EMA_DECAY = 1.5e-3, 0.99


def train(run: Run) -> None:
    if run.init is None:
        raise BadInput(
            "--init: examples.scenes.refit needs the checkpoint whose head is to be fitted"
        )
    texts = ("text_encoder", "text_encoder_2")
    for folder in (run.checkpoint, run.init):
        check_trained(folder, *texts, "fusion")
    original, encoders = (Encoders(folder, run.device) for folder in (run.init, run.checkpoint))
    taught_by, head = (load_part(run.init / "fusion", FusionHead).to(run.device) for _ in range(2))
    taught_by.requires_grad_(False)
    reads = [run.init / "fusion", *(f / part for f in (run.init, run.checkpoint) for part in texts)]
    trainer = run.trainer(head, "refit", LEARNING_RATE, EMA_DECAY, reads)
    told = knows_truth(run.source)
    batches = requests_of(run.source).batches(
        75_000_000 + run.first(reads), run.batch, run.device, captions_only=True
    )

    def loss_at(step: int) -> dict[str, Tensor]:
        captions = batches.at(step).captions
        if told:
            captions = [caption for caption in captions if not names_one_sized(caption)]
        captions = [*captions, ""]  # no prompt is one too
        with torch.no_grad():
            wanted = taught_by(*original(captions))
        return {"loss": F.mse_loss(head(*encoders(captions)), wanted)}

    fitted = trainer.run(loss_at, batches)
    own, teachers = (of / "fusion" for of in (run.checkpoint, teacher_folder(run.checkpoint)))
    if digest([teachers]) == digest([own]):
        save_part(fitted, teachers)
    save_part(fitted, own)


if __name__ == "__main__":
    stage_cli(train, STEPS, BATCH, warm_start=True)
