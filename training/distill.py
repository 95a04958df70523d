"""`python -m training.distill`: a UNet that needs four steps and one row, from the trained one.

Latent consistency distillation (arXiv:2310.04378) in phases (arXiv:2403.06807, 2405.18407): the
noise levels are parted, and the student learns to predict at every level where the teacher, led by
its guidance, would leave its part. So DDIM with one step a part follows the teacher and draws no
new noise; the guidance scale becomes an input (`timestep_cond`). The teacher moves into a
checkpoint of its own, `CHECKPOINT-teacher`, which shares every other part; writes `unet/`,
`scheduler/` and `model_index.json`. With `--init` the student starts from another distilled UNet,
not from the teacher.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor
from torch.nn import functional as F

from networks.fusion_head import FusionHead
from networks.loading import load_part
from training.cli import stage_cli
from training.data import BadInput, Batches
from training.diffusion import FROZEN, Encoders, scheduler, write_index
from training.latents import latent_batches, noised
from training.loop import Trainer
from training.run import Run, check_trained, load_start, save_part
from training.sampling import Sampler
from twinbrush.engine.guidance import guidance_embedding

STEPS, BATCH = 600, 64
PHASES = 4  # parts of the noise levels, and steps of the student
PHASE = scheduler().config["num_train_timesteps"] // PHASES
SOLVER_STEPS = 20  # of the DDIM solver; truth travels one a time, so fewer are learnt sooner
GUIDANCE = (1.0, 4.0)  # scales that the student learns
EMA_DECAY = 0.95  # the paper's; truth travels from one solver step to the next through it
EMBEDDING = 256  # width of the guidance embedding
OWN_PARTS = ("unet", "fusion", "scheduler")  # of the teacher and of the student
DEFAULTS = {"steps": PHASES, "guidance_scale": 2.0}


def ddim_scheduler() -> DDIMScheduler:
    return DDIMScheduler.from_config(scheduler().config, clip_sample=False)


def teacher_folder(checkpoint: Path) -> Path:
    """The folder of the checkpoint that `checkpoint` is distilled from."""
    return checkpoint.with_name(f"{checkpoint.name}-teacher")


def teacher_of(checkpoint: Path) -> Path:
    """The checkpoint to distill from, moved out of `checkpoint` before its UNet is replaced.

    Shared parts are linked, not copied.

    Raises:
        BadInput: there is no UNet, it is distilled and its teacher is gone, or a folder of the
            teacher's name is something else.
    """
    folder = teacher_folder(checkpoint)
    check_trained(checkpoint, *FROZEN, *OWN_PARTS)
    config = UNet2DConditionModel.load_config(checkpoint / "unet")
    if config.get("time_cond_proj_dim") is None:
        if folder.exists():
            if not (folder / "vae").is_symlink():
                raise BadInput(f"--checkpoint: {folder} is not a teacher that was made here")
            shutil.rmtree(folder)
        made = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        shutil.copy(checkpoint / "model_index.json", made)
        for part in filter(Path.is_dir, checkpoint.iterdir()):
            if part.name in OWN_PARTS:
                shutil.copytree(part, made / part.name)
            else:
                (made / part.name).symlink_to(Path("..", checkpoint.name, part.name))
        made.rename(folder)
    elif not folder.is_dir():
        raise BadInput(f"--checkpoint: {checkpoint} is distilled, and its teacher {folder} is gone")
    return folder


def new_student(teacher: UNet2DConditionModel, init: Path | None = None) -> UNet2DConditionModel:
    """The teacher with an input for the guidance scale, which has no effect yet.

    With `init` it has the weights of that checkpoint's UNet.

    Raises:
        BadInput: `init` has no UNet, or none that is distilled and of the teacher's shape.
    """
    student = UNet2DConditionModel.from_config(teacher.config, time_cond_proj_dim=EMBEDDING)
    student.load_state_dict(teacher.state_dict(), strict=False)
    torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    if init:
        load_start(student, init / "unet" / SAFETENSORS_WEIGHTS_NAME, "unet")
    return student


def train(run: Run) -> None:
    original = teacher_of(run.checkpoint)
    device, encoders = run.device, Encoders(run.checkpoint, run.device)
    fusion = load_part(run.checkpoint / "fusion", FusionHead).to(device)
    teacher = load_part(original / "unet", UNet2DConditionModel).to(device)
    student = new_student(teacher, run.init).to(device)
    start = [run.init / "unet"] if run.init else []
    first = run.first(start)
    batches = latent_batches(run, first)
    reads = [*(original / part for part in (*FROZEN, "fusion", "unet")), *start]
    trainer = run.trainer(student, "distill", 3e-4, EMA_DECAY, reads)
    alphas_cumprod = ddim_scheduler().alphas_cumprod.to(device)
    sampler = Sampler(run.checkpoint, encoders, run.source, device)
    stride = len(alphas_cumprod) // SOLVER_STEPS
    with torch.no_grad():
        empty = fusion(*encoders([""]))

    def loss_at(step: int) -> dict[str, Tensor]:
        x0, texts, rng, _ = batches.at(first + step)
        draw = torch.Generator().manual_seed(first + step)
        noise = torch.randn(x0.shape, generator=draw).to(device)
        t = torch.randint(1, SOLVER_STEPS + 1, (run.batch,), generator=draw).to(device) * stride - 1
        scales = rng.uniform(*GUIDANCE, size=run.batch)
        embedding = scale_embedding(scales).to(device)
        w = torch.from_numpy(scales).float().to(device)[:, None, None, None]
        x_t = noised(x0, noise, alphas_cumprod[t])
        with torch.no_grad():
            hidden = fusion(*encoders(texts))
            before, end = t - stride, end_of_phase(t)
            v = guided(teacher, x_t, t, empty, hidden, w)
            x_before = ddim_step(x_t, v, t, before, alphas_cumprod)
            conditions = {"encoder_hidden_states": hidden, "timestep_cond": embedding}
            onward = trainer.ema.module(x_before, before.clamp(min=0), **conditions).sample.float()
            x_end = ddim_step(x_before, onward, before, end, alphas_cumprod)
            target = velocity(x_t, x_end, t, end, alphas_cumprod)
        return {"loss": F.mse_loss(trainer.module(x_t, t, **conditions).sample.float(), target)}

    train_student(run, trainer, loss_at, batches, sampler, fusion)


def train_student(
    run: Run,
    trainer: Trainer,
    loss_at: Callable[[int], dict[str, Tensor]],
    batches: Batches,
    sampler: Sampler,
    fusion: FusionHead,
) -> None:
    """Trains a student to the end; writes `unet/`, `scheduler/` and `model_index.json`."""
    student = trainer.run(
        loss_at,
        batches,
        lambda averaged: sampler.sheet(averaged, fusion, ddim_scheduler(), DEFAULTS),
    )
    write_index(run.checkpoint, ddim_scheduler(), DEFAULTS, run.source)
    save_part(student.half(), run.checkpoint / "unet")  # last: this run's saves name the old one


def check_distilled(checkpoint: Path) -> None:
    """Raises BadInput if a checkpoint has no distilled UNet, or no encoders for it."""
    check_trained(checkpoint, *FROZEN, "fusion", "unet")
    if UNet2DConditionModel.load_config(checkpoint / "unet").get("time_cond_proj_dim") is None:
        raise BadInput(f"--checkpoint: the UNet of {checkpoint} is not distilled yet")


def scale_embedding(scales: Sequence[float] | np.ndarray | Tensor) -> Tensor:
    """The student's input for guidance scales: (B, `EMBEDDING`)."""
    return torch.from_numpy(np.stack([guidance_embedding(w, EMBEDDING) for w in scales]))


def guided(
    teacher: UNet2DConditionModel, x_t: Tensor, t: Tensor, empty: Tensor, hidden: Tensor, w: Tensor
) -> Tensor:
    """The teacher's v (B, C, h, w), led away from no prompt by the scales `w` (B, 1, 1, 1).

    Args:
        empty: conditioning of no prompt, (1, L, D); `hidden` is that of the prompts, (B, L, D).
    """
    led = torch.cat([empty.expand_as(hidden), hidden])
    v = teacher(x_t.repeat(2, 1, 1, 1), t.repeat(2), encoder_hidden_states=led).sample
    without, with_prompt = v.float().chunk(2)
    return without + w * (with_prompt - without)


def end_of_phase(t: Tensor) -> Tensor:
    """The timesteps (B,) that the student goes to from `t`; -1 is the picture itself."""
    return t // PHASE * PHASE - 1


def alpha_sigma(t: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of signal and noise (B, 1, 1, 1) at timesteps (B,); -1 is the picture itself."""
    clean = torch.ones((), device=t.device)
    alpha_bar = torch.where(t < 0, clean, alphas_cumprod[t.clamp(min=0)])[:, None, None, None]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def ddim_step(x_t: Tensor, v: Tensor, t: Tensor, to: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Latents at the timesteps `to` (B,), one solver step towards the picture."""
    (alpha, sigma), (alpha_to, sigma_to) = (alpha_sigma(level, alphas_cumprod) for level in (t, to))
    return alpha_to * (alpha * x_t - sigma * v) + sigma_to * (sigma * x_t + alpha * v)


def velocity(x_t: Tensor, x_to: Tensor, t: Tensor, to: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The v with which `ddim_step` leads from x_t to x_to."""
    (alpha, sigma), (alpha_to, sigma_to) = (alpha_sigma(level, alphas_cumprod) for level in (t, to))
    turned = (alpha_to * alpha + sigma_to * sigma) * x_t
    return (turned - x_to) / (alpha_to * sigma - sigma_to * alpha)


if __name__ == "__main__":
    stage_cli(train, STEPS, BATCH, warm_start=True)
