"""Stage `align`: the distilled UNet learns from the pictures that it paints.

Distillation shows the student noised pictures; served, it starts from noise and continues from its
own steps. Here it paints as it is served. From each of its own latents it learns to reach what its
teacher reaches: the student as it was when training began, in finer steps, which paint better
(on-policy distillation, arXiv:2306.13649). On scenes it also follows the reward model's reading of
the ends of its steps. That reads noisy latents too and predicts what they become, so each step gets
the gradient of its own end alone: a gradient through several steps is mostly noise. Only the end of
the first step cannot be read; it gets the gradient of the second's. Writes `unet/`, from that of
the checkpoint or of `--init`; training that continues from there has the better teacher.
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
from examples.scenes.world import knows_truth
from networks.fusion_head import FusionHead
from networks.loading import load_part
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
    train_student,
    velocity,
)
from training.run import Run, check_trained, load_start
from training.sampling import Sampler

STEPS, BATCH = 400, 32
FINER = 5  # of the teacher's steps in one of the student's
COMPARED = 4  # one in so many pictures is compared with the teacher, if there is a reward too
REWARD = 0.1  # weight of the faults beside the error of v
LONGEST = 0.1  # gradient of the weighted faults at one picture's latents, at most
LEARNING_RATE, EMA_DECAY = 1.5e-4, 0.98


def train(run: Run) -> None:
    rewarded = knows_truth(run.source)
    if rewarded:
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
    if rewarded:
        reader = load_part(run.checkpoint / "reward_model", SceneReader).to(device)
        vae = load_part(run.checkpoint / "vae", VQModel).to(device)
        reader.requires_grad_(False)
        vae.requires_grad_(False)
        reads.append(run.checkpoint / "reward_model")
    trainer = run.trainer(student, "align", LEARNING_RATE, EMA_DECAY, reads)
    first = run.first(reads)
    batches = run.source.batches(80_000_000 + first, run.batch, device, captions_only=True)
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
        conditions = {
            "encoder_hidden_states": hidden,
            "timestep_cond": scale_embedding(scales).to(device),
        }
        compared = slice(math.ceil(n / COMPARED) if rewarded else n)
        path = paint(student, noise, conditions, alphas_cumprod, compared)
        x_t = torch.cat([phase.x_t[compared] for phase in path])
        v = torch.cat([phase.v[compared] for phase in path])
        t = timesteps(device).repeat_interleave(len(noise[compared]))
        repeated = {
            name: tensor[compared].repeat(PHASES, *[1] * (tensor.ndim - 1))
            for name, tensor in conditions.items()
        }
        error = F.mse_loss(v, teacher_velocity(teacher, x_t, t, repeated, alphas_cumprod))
        if not rewarded:
            return {"loss": error}
        found = []
        for level, x_end in enumerate(readable(vae, path)):
            read = reader(x_end, torch.full((n,), level, device=device))
            found.append(faults(read, drawn.truth, drawn.captions))
        sums = [torch.stack([*parts.values()]).sum() for parts in found]
        return {
            "loss": error + REWARD * torch.stack(sums).sum(),
            "error": error,
            **{f"faults_{level}": total for level, total in enumerate(sums)},
            **found[0],
        }

    train_student(run, trainer, loss_at, batches, sampler, fusion)


class Phase(NamedTuple):
    """One of the student's steps: latents before and after it and the v between, (B, C, h, w)."""

    x_t: Tensor
    v: Tensor
    x_end: Tensor


def timesteps(device: torch.device) -> Tensor:
    """Of the student's steps, from noise to the picture: (`PHASES`,)."""
    return torch.arange(PHASES, 0, -1, device=device) * PHASE - 1


@torch.no_grad()
def teacher_velocity(
    teacher: UNet2DConditionModel,
    x_t: Tensor,
    t: Tensor,
    conditions: dict[str, Tensor],
    alphas_cumprod: Tensor,
) -> Tensor:
    """The v (B, C, h, w) that leads to the end of the teacher's phase, in `FINER` steps."""
    x_to, to = x_t, t
    for _ in range(FINER):
        before = to - PHASE // FINER
        v = teacher(x_to, to, **conditions).sample.float()
        x_to, to = ddim_step(x_to, v, to, before, alphas_cumprod), before
    return velocity(x_t, x_to, t, to, alphas_cumprod)


def paint(
    student: UNet2DConditionModel,
    noise: Tensor,
    conditions: dict[str, Tensor],
    alphas_cumprod: Tensor,
    compared: slice,
) -> list[Phase]:
    """The student's steps from noise (B, C, h, w) to pictures.

    Each has a gradient of its own, of which no picture's is longer than `LONGEST` over B; the
    first has that of the second too, but for the pictures that are `compared` with the teacher.
    """
    path, x_t = [], noise
    for t in timesteps(noise.device):
        t = t.expand(len(noise))
        v = student(x_t, t, **conditions).sample.float()
        x_end = ddim_step(x_t, v, t, end_of_phase(t), alphas_cumprod)
        x_end.register_hook(shortened)
        path.append(Phase(x_t, v, x_end))
        x_t = x_end.detach()
        if len(path) == 1:
            x_t = x_end.clone()
            x_t[compared] = x_end[compared].detach()
    return path


def readable(vae: VQModel, path: list[Phase]) -> list[Tensor]:
    """The ends of the student's steps as a `SceneReader` takes them, by level."""
    finished, *noisy = [phase.x_end for phase in reversed(path[-LEVELS:])]
    return [nearest_codes(vae, finished), *noisy]


def shortened(gradient: Tensor) -> Tensor:
    """A gradient (B, C, h, w) of a mean over B pictures, with no picture's too long."""
    lengths = len(gradient) * gradient.flatten(1).norm(dim=1)
    return gradient * (LONGEST / lengths.clamp(min=LONGEST))[:, None, None, None]
