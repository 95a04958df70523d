"""`python -m training.align`: the distilled UNet learns from the pictures that it paints.

Distillation shows the student noised pictures; served, it starts from noise and goes on from its
own steps. Here it paints as it is served. It learns where the teacher would have gone from its own
latents (on-policy distillation, arXiv:2306.13649), and, where the truth of captions is known, it
follows what the reward model says of the latents after its steps, back through every step of the
sampler (arXiv:2309.17400). That gradient is chaotic where latents lie between two pictures, so it
is cut to length on its way, picture by picture, and the reward model reads noisy latents too: what
it expects there is a smoother guide to the earlier steps. Writes `unet/`, from that of the
checkpoint or of `--init`.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel, VQModel
from torch import Tensor
from torch.nn import functional as F

from export.checkpoint import load_part
from export.fusion_head import FusionHead
from training.cli import stage_cli
from training.data import BadInput, knows_truth
from training.diffusion import FROZEN, Encoders
from training.distill import (
    GUIDANCE,
    PHASE,
    PHASES,
    ddim_scheduler,
    ddim_step,
    end_of_phase,
    guided,
    new_student,
    scale_embedding,
    teach,
    teacher_of,
    velocity,
)
from training.reward import LEVELS, SceneReader, faults, nearest_codes
from training.run import Run, check_trained
from training.sampling import Sampler

STEPS, BATCH = 300, 32
TEACHER_STEPS = 2  # of the teacher's DDIM in one of the student's
REWARD = 0.1  # weight of the faults beside the error of v
LONGEST = 0.1  # gradient of the weighted faults at one picture's latents, at most
LEARNING_RATE, EMA_DECAY = 1.5e-4, 0.98


def train(run: Run) -> None:
    told = knows_truth(run.source)
    check_trained(run.checkpoint, *FROZEN, "fusion", "unet", *(["reward_model"] if told else []))
    if UNet2DConditionModel.load_config(run.checkpoint / "unet").get("time_cond_proj_dim") is None:
        raise BadInput(f"--checkpoint: the UNet of {run.checkpoint} is not distilled yet")
    taught_by, start = teacher_of(run.checkpoint), (run.init or run.checkpoint) / "unet"
    device, encoders = run.device, Encoders(run.checkpoint, run.device)
    fusion = load_part(run.checkpoint / "fusion", FusionHead).to(device)
    teacher = load_part(taught_by / "unet", UNet2DConditionModel).to(device)
    student = new_student(teacher, run.init).to(device)
    if not run.init:
        student.load_state_dict(load_part(start, UNet2DConditionModel).state_dict())
    reads = [taught_by / "unet", start, *(run.checkpoint / part for part in (*FROZEN, "fusion"))]
    if told:
        reader = load_part(run.checkpoint / "reward_model", SceneReader).to(device)
        vae = load_part(run.checkpoint / "vae", VQModel).to(device)
        reader.requires_grad_(False)
        vae.requires_grad_(False)
        reads.append(run.checkpoint / "reward_model")
    trainer = run.trainer(student, "align", LEARNING_RATE, EMA_DECAY, reads)
    batches = run.source.batches(80_000_000, run.batch, device, captions_only=True)
    sampler = Sampler(run.checkpoint, encoders, run.source, device)
    alphas_cumprod = ddim_scheduler().alphas_cumprod.to(device)
    with torch.no_grad():
        empty = fusion(*encoders([""]))

    def loss_at(step: int) -> dict[str, Tensor]:
        drawn, draw = batches.at(step), torch.Generator().manual_seed(step)
        n, (low, high) = len(drawn.captions), GUIDANCE
        shape = (n, student.config.in_channels, *(student.config.sample_size,) * 2)
        noise = torch.randn(shape, generator=draw).to(device)
        scales = low + (high - low) * torch.rand(n, generator=draw)
        w = scales.to(device)[:, None, None, None]
        with torch.no_grad():
            hidden = fusion(*encoders(drawn.captions))
        asked = {
            "encoder_hidden_states": hidden,
            "timestep_cond": scale_embedding(scales).to(device),
        }
        with torch.set_grad_enabled(told):
            path = paint(student, noise, asked, alphas_cumprod)
        # Half of the pictures are compared with the teacher, who takes longer.
        half = slice((n + 1) // 2)
        x_t = torch.cat([x[half] for x in path[:-1]]).detach()
        asked = {
            name: one[half].repeat(PHASES, *[1] * (one.ndim - 1)) for name, one in asked.items()
        }
        t = timesteps(device).repeat_interleave(len(noise[half]))
        led = {"hidden": asked["encoder_hidden_states"], "w": w[half].repeat(PHASES, 1, 1, 1)}
        target = taught(teacher, x_t, t, alphas_cumprod, empty=empty, **led)
        error = F.mse_loss(student(x_t, t, **asked).sample.float(), target)
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


def timesteps(device: torch.device) -> Tensor:
    """At which the student is asked, from noise to the picture: (`PHASES`,)."""
    return torch.arange(PHASES, 0, -1, device=device) * PHASE - 1


@torch.no_grad()
def taught(
    teacher: UNet2DConditionModel, x_t: Tensor, t: Tensor, alphas_cumprod: Tensor, **led: Tensor
) -> Tensor:
    """The v (B, C, h, w) that leads where the teacher, led as `guided` has it, ends the phase."""
    x_to, to = x_t, t
    for _ in range(TEACHER_STEPS):
        before = to - PHASE // TEACHER_STEPS
        v = guided(teacher, x_to, to, **led)
        x_to, to = ddim_step(x_to, v, to, before, alphas_cumprod), before
    return velocity(x_t, x_to, t, to, alphas_cumprod)


def paint(
    student: UNet2DConditionModel, noise: Tensor, asked: dict[str, Tensor], alphas_cumprod: Tensor
) -> list[Tensor]:
    """Latents (B, C, h, w) before each of the student's steps and after the last.

    Where they have a gradient, none of a picture's is longer than `LONGEST` over B.
    """
    path = [noise]
    for t in timesteps(noise.device):
        t = t.expand(len(noise))
        v = student(path[-1], t, **asked).sample.float()
        x_t = ddim_step(path[-1], v, t, end_of_phase(t), alphas_cumprod)
        if x_t.requires_grad:
            x_t.register_hook(shortened)
        path.append(x_t)
    return path


def readable(vae: VQModel, path: list[Tensor]) -> list[Tensor]:
    """What a `SceneReader` reads of the latents that `paint` left, by level."""
    return [nearest_codes(vae, path[-1]), *reversed(path[-LEVELS:-1])]


def shortened(gradient: Tensor) -> Tensor:
    """A gradient (B, C, h, w) of a mean over B pictures, with no picture's too long."""
    lengths = len(gradient) * gradient.flatten(1).norm(dim=1)
    return gradient * (LONGEST / lengths.clamp(min=LONGEST))[:, None, None, None]


if __name__ == "__main__":
    stage_cli(train, STEPS, BATCH, warm_start=True)
