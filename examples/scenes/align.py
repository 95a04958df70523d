"""`python -m examples.scenes.align`: the distilled UNet learns from the pictures that it paints.

Distillation shows the student noised pictures; served, it starts from noise and goes on from its
own steps. Here it paints as it is served. From each of its own latents it learns to go where its
teacher comes: the student as it was when training began, in finer steps, which paint better
(on-policy distillation, arXiv:2306.13649). Where the truth of captions is known, it also follows
what the reward model says of where its steps end. That reads noisy latents too and says what to
expect there, so each step answers for its own end alone: a gradient through several steps is
mostly noise. Only where the first one ends there is nothing to read; it answers for the end of the
second. Writes `unet/`, from that of the checkpoint or of `--init`; training that goes on from there
has the better teacher.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel, VQModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor
from torch.nn import functional as F

from examples.scenes.reward import LEVELS, SceneReader, faults, nearest_codes
from networks.fusion_head import FusionHead
from networks.loading import load_part
from training.cli import stage_cli
from training.data import knows_truth, requests_of
from training.diffusion import FROZEN, Encoders
from training.distill import (
    GUIDANCE,
    PHASE,
    PHASES,
    check_distilled,
    ddim_scheduler,
    ddim_step,
    end_of_phase,
    scale_embedding,
    teach,
    velocity,
)
from training.run import Run, check_trained, load_start
from training.sampling import Sampler

STEPS, BATCH = 400, 32
FINER = 5  # of the teacher's steps in one of the student's
TAUGHT = 4  # one in so many pictures is compared with the teacher, where there is a reward too
REWARD = 0.1  # weight of the faults beside the error of v
LONGEST = 0.1  # gradient of the weighted faults at one picture's latents, at most
LEARNING_RATE, EMA_DECAY = 1.5e-4, 0.98


def train(run: Run) -> None:
    told = knows_truth(run.source)
    if told:
        check_trained(run.checkpoint, "reward_model")
    check_distilled(run.checkpoint)
    start = (run.init or run.checkpoint) / "unet"
    device, encoders = run.device, Encoders(run.checkpoint, run.device)
    fusion = load_part(run.checkpoint / "fusion", FusionHead).to(device)
    student = load_part(run.checkpoint / "unet", UNet2DConditionModel).to(device)
    if run.init:
        load_start(student, start / SAFETENSORS_WEIGHTS_NAME, "unet")
    teacher = copy.deepcopy(student)
    reads = [start, *(run.checkpoint / part for part in (*FROZEN, "fusion"))]
    if told:
        reader = load_part(run.checkpoint / "reward_model", SceneReader).to(device)
        vae = load_part(run.checkpoint / "vae", VQModel).to(device)
        reader.requires_grad_(False)
        vae.requires_grad_(False)
        reads.append(run.checkpoint / "reward_model")
    trainer = run.trainer(student, "align", LEARNING_RATE, EMA_DECAY, reads)
    first = run.first(reads)
    batches = requests_of(run.source).batches(
        80_000_000 + first, run.batch, device, captions_only=True
    )
    sampler = Sampler(run.checkpoint, encoders, run.source, device)
    alphas_cumprod = ddim_scheduler().alphas_cumprod.to(device)

    def loss_at(step: int) -> dict[str, Tensor]:
        drawn, draw = batches.at(step), torch.Generator().manual_seed(first + step)
        n, (low, high) = len(drawn.captions), GUIDANCE
        shape = (n, student.config.in_channels, *(student.config.sample_size,) * 2)
        noise = torch.randn(shape, generator=draw).to(device)
        scales = low + (high - low) * torch.rand(n, generator=draw)
        with torch.no_grad():
            hidden = fusion(*encoders(drawn.captions))
        asked = {
            "encoder_hidden_states": hidden,
            "timestep_cond": scale_embedding(scales).to(device),
        }
        some = slice(math.ceil(n / TAUGHT) if told else n)
        path = paint(student, noise, asked, alphas_cumprod, some)
        x_t = torch.cat([phase.x_t[some] for phase in path])
        v = torch.cat([phase.v[some] for phase in path])
        t = timesteps(device).repeat_interleave(len(noise[some]))
        asked = {
            name: one[some].repeat(PHASES, *[1] * (one.ndim - 1)) for name, one in asked.items()
        }
        error = F.mse_loss(v, taught(teacher, x_t, t, asked, alphas_cumprod))
        if not told:
            return {"loss": error}
        found = []
        for level, x_end in enumerate(readable(vae, path)):
            read = reader(x_end, torch.full((n,), level, device=device))
            found.append(faults(read, drawn.scenes, drawn.captions))
        sums = [torch.stack([*parts.values()]).sum() for parts in found]
        return {
            "loss": error + REWARD * torch.stack(sums).sum(),
            "error": error,
            **{f"faults_{level}": total for level, total in enumerate(sums)},
            **found[0],
        }

    teach(run, trainer, loss_at, batches, sampler, fusion)


class Phase(NamedTuple):
    """One of the student's steps: latents before and after it and the v between, (B, C, h, w)."""

    x_t: Tensor
    v: Tensor
    x_end: Tensor


def timesteps(device: torch.device) -> Tensor:
    """At which the student is asked, from noise to the picture: (`PHASES`,)."""
    return torch.arange(PHASES, 0, -1, device=device) * PHASE - 1


@torch.no_grad()
def taught(
    teacher: UNet2DConditionModel,
    x_t: Tensor,
    t: Tensor,
    asked: dict[str, Tensor],
    alphas_cumprod: Tensor,
) -> Tensor:
    """The v (B, C, h, w) that leads where the teacher ends the phase in `FINER` steps."""
    x_to, to = x_t, t
    for _ in range(FINER):
        before = to - PHASE // FINER
        v = teacher(x_to, to, **asked).sample.float()
        x_to, to = ddim_step(x_to, v, to, before, alphas_cumprod), before
    return velocity(x_t, x_to, t, to, alphas_cumprod)


def paint(
    student: UNet2DConditionModel,
    noise: Tensor,
    asked: dict[str, Tensor],
    alphas_cumprod: Tensor,
    some: slice,
) -> list[Phase]:
    """The student's steps from noise (B, C, h, w) to pictures.

    Each has a gradient of its own, where none of a picture's is longer than `LONGEST` over B; the
    first has that of the second too, but for `some`, which the teacher judges step by step.
    """
    path, x_t = [], noise
    for t in timesteps(noise.device):
        t = t.expand(len(noise))
        v = student(x_t, t, **asked).sample.float()
        x_end = ddim_step(x_t, v, t, end_of_phase(t), alphas_cumprod)
        x_end.register_hook(shortened)
        path.append(Phase(x_t, v, x_end))
        x_t = x_end.detach()
        if len(path) == 1:
            x_t = x_end.clone()
            x_t[some] = x_end[some].detach()
    return path


def readable(vae: VQModel, path: list[Phase]) -> list[Tensor]:
    """What a `SceneReader` reads of where the student's steps end, by level."""
    finished, *noisy = [phase.x_end for phase in reversed(path[-LEVELS:])]
    return [nearest_codes(vae, finished), *noisy]


def shortened(gradient: Tensor) -> Tensor:
    """A gradient (B, C, h, w) of a mean over B pictures, with no picture's too long."""
    lengths = len(gradient) * gradient.flatten(1).norm(dim=1)
    return gradient * (LONGEST / lengths.clamp(min=LONGEST))[:, None, None, None]


if __name__ == "__main__":
    stage_cli(train, STEPS, BATCH, warm_start=True)
