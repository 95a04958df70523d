"""Stage `fit_fusion_head`: the fusion head gives the same tokens behind other encoders.

A UNet reads its text from the fusion head's tokens alone. If CLIP or BERT was trained anew, the
head of `--init`, the checkpoint as it was, learns to give behind the new encoders what it gives
behind its own (distillation, arXiv:1503.02531); the UNet needs no training. On scenes the captions
leave out what training shows in one size alone, so that what the old encoders concluded from such
kinds is not learnt again. Writes `fusion/`, and that of the teacher that the checkpoint was
distilled from, if the two had the same head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.scenes.scenes import names_one_sized
from examples.scenes.world import knows_truth
from networks.fusion_head import FusionHead
from networks.loading import load_part
from training.data import BadInput
from training.diffusion import Encoders
from training.distill import teacher_folder
from training.run import Run, check_trained, digest, save_part

STEPS, BATCH = 2000, 96
LEARNING_RATE, EMA_DECAY = 1.5e-3, 0.99


def train(run: Run) -> None:
    if run.init is None:
        raise BadInput(
            "--init: the stage fit_fusion_head needs the checkpoint whose head is to be fitted"
        )
    texts = ("text_encoder", "bert")
    for folder in (run.checkpoint, run.init):
        check_trained(folder, *texts, "fusion")
    original, encoders = (Encoders(folder, run.device) for folder in (run.init, run.checkpoint))
    teacher, head = (load_part(run.init / "fusion", FusionHead).to(run.device) for _ in range(2))
    teacher.requires_grad_(False)
    reads = [run.init / "fusion", *(f / part for f in (run.init, run.checkpoint) for part in texts)]
    trainer = run.trainer(head, "fit_fusion_head", LEARNING_RATE, EMA_DECAY, reads)
    scenes = knows_truth(run.source)
    batches = run.source.batches(
        75_000_000 + run.first(reads), run.batch, run.device, captions_only=True
    )

    def loss_at(step: int) -> dict[str, Tensor]:
        captions = batches.at(step).captions
        if scenes:
            captions = [caption for caption in captions if not names_one_sized(caption)]
        captions = [*captions, ""]  # the empty prompt counts too
        with torch.no_grad():
            wanted = teacher(*original(captions))
        return {"loss": F.mse_loss(head(*encoders(captions)), wanted)}

    fitted = trainer.run(loss_at, batches)
    own, other = (of / "fusion" for of in (run.checkpoint, teacher_folder(run.checkpoint)))
    if digest([other]) == digest([own]):
        save_part(fitted, other)
    save_part(fitted, own)
