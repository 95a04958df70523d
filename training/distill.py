"""`python -m training.distill`: a UNet that needs four steps and one row, from the trained one.

Latent consistency distillation (arXiv:2310.04378): the student learns to say at every noise
level what the teacher, led by its guidance, would arrive at; the guidance scale becomes an
input (`timestep_cond`). The teacher moves into a checkpoint of its own, `CHECKPOINT-teacher`,
which shares every other part; writes `unet/`, `scheduler/` and `model_index.json`. With `--init`
the student starts from what another distillation has learnt, not from the teacher.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor
from torch.nn import functional as F

from export.checkpoint import load_part
from export.fusion_head import FusionHead
from training.cli import stage_cli
from training.data import BadInput
from training.diffusion import FROZEN, Encoders, latent_batches, noised, scheduler, write_index
from training.run import Run, check_trained, load_start
from training.sampling import Sampler
from twinbrush.samplers import guidance_embedding

STEPS, BATCH = 1600, 64
SOLVER_STEPS = 25  # of the DDIM solver; truth travels one a time, so fewer are learnt sooner
GUIDANCE = (1.0, 6.0)  # scales that the student learns, half of them below 2.25
EMA_DECAY = 0.95  # the paper's; truth travels from one solver step to the next through it
EMBEDDING = 256  # width of the guidance embedding
OWN_PARTS = ("unet", "fusion", "scheduler")  # of the teacher and of the student
DEFAULTS = {"steps": 4, "guidance_scale": 2.0}


def lcm_scheduler() -> LCMScheduler:
    return LCMScheduler.from_config(
        scheduler().config, original_inference_steps=SOLVER_STEPS, clip_sample=False
    )


def teacher_of(checkpoint: Path) -> Path:
    """The checkpoint that is distilled, moved out of `checkpoint` while it is still there.

    What both share is linked, not copied.

    Raises:
        BadInput: there is no UNet, it is distilled and what it was distilled from is not there,
            or a folder of the teacher's name is something else.
    """
    folder = checkpoint.with_name(f"{checkpoint.name}-teacher")
    check_trained(checkpoint, *FROZEN, *OWN_PARTS)
    config = UNet2DConditionModel.load_config(checkpoint / "unet")
    if config.get("time_cond_proj_dim") is None:
        if folder.exists():
            if not (folder / "vae").is_symlink():
                raise BadInput(f"--checkpoint: {folder} is not a teacher that was made here")
            shutil.rmtree(folder)
        folder.mkdir()
        shutil.copy(checkpoint / "model_index.json", folder)
        for part in filter(Path.is_dir, checkpoint.iterdir()):
            if part.name in OWN_PARTS:
                shutil.copytree(part, folder / part.name)
            else:
                (folder / part.name).symlink_to(Path("..", checkpoint.name, part.name))
    elif not folder.is_dir():
        raise BadInput(f"--checkpoint: {checkpoint} is distilled, and its teacher {folder} is gone")
    return folder


def new_student(teacher: UNet2DConditionModel, init: Path | None = None) -> UNet2DConditionModel:
    """The teacher with an input for the guidance scale, which says nothing yet.

    With `init` it has the weights of that checkpoint's UNet.

    Raises:
        BadInput: `init` has no UNet, or none that is distilled and of the teacher's shape.
    """
    config = {k: v for k, v in teacher.config.items() if k != "_name_or_path"}  # a local path
    student = UNet2DConditionModel.from_config(config, time_cond_proj_dim=EMBEDDING)
    student.load_state_dict(teacher.state_dict(), strict=False)
    torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    if init:
        load_start(student, init / "unet" / SAFETENSORS_WEIGHTS_NAME, "unet")
    return student


def train(run: Run) -> None:
    taught_by = teacher_of(run.checkpoint)
    device, encoders = run.device, Encoders(run.checkpoint, run.device)
    fusion = load_part(run.checkpoint / "fusion", FusionHead).to(device)
    teacher = load_part(taught_by / "unet", UNet2DConditionModel).to(device)
    student = new_student(teacher, run.init).to(device)
    batches = latent_batches(run)
    reads = [taught_by / part for part in (*FROZEN, "fusion", "unet")]
    if run.init:
        reads.append(run.init / "unet")
    trainer = run.trainer(student, "distill", 3e-4, EMA_DECAY, reads)
    alphas_cumprod = lcm_scheduler().alphas_cumprod.to(device)
    sampler = Sampler(run.checkpoint, encoders, run.source, device)
    stride = len(alphas_cumprod) // SOLVER_STEPS
    with torch.no_grad():
        empty = fusion(*encoders([""]))

    def loss_at(step: int) -> dict[str, Tensor]:
        x0, texts, rng, _ = batches.at(step)
        draw = torch.Generator().manual_seed(step)
        noise = torch.randn(x0.shape, generator=draw).to(device)
        t = torch.randint(1, SOLVER_STEPS + 1, (run.batch,), generator=draw).to(device) * stride - 1
        low, high = GUIDANCE
        scales = low + (high - low) * rng.random(run.batch) ** 2
        embedding = np.stack([guidance_embedding(w, EMBEDDING) for w in scales])
        embedding = torch.from_numpy(embedding).to(device)
        w = torch.from_numpy(scales).float().to(device)[:, None, None, None]
        x_t = noised(x0, noise, alphas_cumprod[t])
        with torch.no_grad():
            hidden = fusion(*encoders(texts))
            led = torch.cat([empty.expand_as(hidden), hidden])
            v = teacher(x_t.repeat(2, 1, 1, 1), t.repeat(2), encoder_hidden_states=led).sample
            without, with_prompt = v.float().chunk(2)
            x_before, t_before = ddim_step(
                x_t, without + w * (with_prompt - without), t, stride, alphas_cumprod
            )
            target = consistency(
                trainer.ema.module, x_before, t_before, hidden, embedding, alphas_cumprod
            )
            target = torch.where((t_before < 0)[:, None, None, None], x_before, target)
        said = consistency(trainer.module, x_t, t, hidden, embedding, alphas_cumprod)
        return {"loss": F.huber_loss(said, target, delta=0.1)}

    trained = trainer.run(
        loss_at,
        batches,
        lambda averaged: sampler.sheet(averaged, fusion, lcm_scheduler(), DEFAULTS),
    )
    trained.half().save_pretrained(run.checkpoint / "unet")
    write_index(run.checkpoint, lcm_scheduler(), DEFAULTS, run.source)


def ddim_step(
    x_t: Tensor, v: Tensor, t: Tensor, stride: int, alphas_cumprod: Tensor
) -> tuple[Tensor, Tensor]:
    """One solver step towards the picture: the latents, and their timesteps, -1 at its end."""
    before = t - stride
    alpha_bar = torch.where(
        before < 0, torch.ones((), device=t.device), alphas_cumprod[before.clamp(min=0)]
    )
    x0 = noised(x_t, -v, alphas_cumprod[t])
    epsilon = noised(v, x_t, alphas_cumprod[t])
    return noised(x0, epsilon, alpha_bar), before


def consistency(
    unet: UNet2DConditionModel,
    x_t: Tensor,
    t: Tensor,
    hidden: Tensor,
    embedding: Tensor,
    alphas_cumprod: Tensor,
) -> Tensor:
    """The clean latents that a consistency model sees from x_t; the boundary is LCM's."""
    t = t.clamp(min=0)
    v = unet(x_t, t, encoder_hidden_states=hidden, timestep_cond=embedding).sample.float()
    sigma_data, scaled = 0.5, t[:, None, None, None] * 10.0
    skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    out = scaled / (scaled**2 + sigma_data**2).sqrt()
    return skip * x_t + out * noised(x_t, -v, alphas_cumprod[t])


if __name__ == "__main__":
    stage_cli(train, STEPS, BATCH, warm_start=True)
