"""`python -m training.vqgan`: the VQGAN (arXiv:2012.09841) that turns latents into pixels.

First an autoencoder without quantisation, so that small differences find their place in the
latents; then the codebook starts from what the encoder says, and codes that nothing uses move
to where the error is largest. Pictures are learnt in opponent colours, where hue weighs more
than in RGB; the change of colours is folded into the first and last convolution at the end.
Writes `vae/`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import VQModel
from PIL import Image
from torch import nn
from torch.nn import functional as F

from training import data
from training.cli import stage_cli
from training.loop import Trainer
from training.sheets import grid

STEPS, BATCH = 4500, 32
WARM_UP = 0.5  # share of the steps before the codebook is used
REVIVE_EVERY = 100  # steps
COMMITMENT = 0.05
# Rows: lightness, red against green, yellow against blue; orthogonal, hue twice as large.
OPPONENT = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
OPPONENT = OPPONENT / OPPONENT.norm(dim=1, keepdim=True) * torch.tensor([[1.0], [2.0], [2.0]])


def build(side: int = 64) -> VQModel:
    torch.manual_seed(0)
    model = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96), layers_per_block=1, norm_num_groups=8,
        latent_channels=8, vq_embed_dim=8, num_vq_embeddings=1024, sample_size=side,
    )  # fmt: skip
    model.quantize.legacy, model.quantize.beta = False, COMMITMENT
    return model


class Stage(nn.Module):
    """The model, and how often each code was used since the last revival."""

    def __init__(self, side: int = 64) -> None:
        super().__init__()
        self.model = build(side)
        self.register_buffer("use", torch.zeros(self.model.config["num_vq_embeddings"]))


def train(
    checkpoint: Path,
    runs: Path,
    steps: int,
    batch: int,
    bf16: bool = False,
    device: torch.device = data.CPU,
    source: data.Source = data.SCENES,
    save_every: int = 100,
) -> None:
    stage = Stage(source.side).to(device)
    model, use = stage.model, stage.use
    start = int(WARM_UP * steps)
    batches = source.batches(30_000_000, batch, device)
    shown = source.sample(39_999_998, 8).pictures.to(device)

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        x = opponent(batches.at(step).pictures)
        if step >= start and (step - start) % REVIVE_EVERY == 0 and step < 0.9 * steps:
            if step == start:
                use.zero_()
            revive(model, use, step, source)
        z = model.encode(x).latents.float()
        codebook = torch.zeros((), device=device)
        if step >= start:
            with torch.autocast(device.type, enabled=False):
                z, codebook, (_, _, codes) = model.quantize(z)
            use.index_add_(0, codes.flatten(), torch.ones(codes.numel(), device=device))
        y = model.decoder(model.post_quant_conv(z)).float()
        loss = F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + codebook
        return {"loss": loss, "psnr": psnr(rgb(y), rgb(x)), "codes_used": (use > 0).float().mean()}

    def samples(averaged: Stage) -> Image.Image:
        z = averaged.model.encode(opponent(shown)).latents
        if trainer.step > start:
            z, _, _ = averaged.model.quantize(z)
        painted = rgb(averaged.model.decoder(averaged.model.post_quant_conv(z)))
        return grid(torch.cat([shown, painted]), columns=len(shown))

    trainer = Trainer(stage, runs / "vqgan", steps, 1.5e-3, 0.998, save_every=save_every, bf16=bf16)
    trained = trainer.run(loss_at, batches, samples).model
    fold_colours(trained)
    with torch.no_grad():
        spread = trained.encode(source.sample(39_999_999, 512).pictures.to(device)).latents.std()
    trained.register_to_config(scaling_factor=1 / float(spread))
    trained.save_pretrained(checkpoint / "vae")


@torch.no_grad()
def revive(model: VQModel, use: torch.Tensor, seed: int, source: data.Source = data.SCENES) -> None:
    """Moves codes that nothing used onto encoder outputs, in eight rounds.

    Outputs are drawn in proportion to their squared distance from the codes that live
    (k-means++), so that rare details get codes and flat backgrounds do not take them all.
    """
    x = opponent(source.sample(seed, 128).pictures.to(use.device))
    vectors = model.encode(x).latents.float().permute(0, 2, 3, 1).flatten(0, 2)
    codes = model.quantize.embedding.weight.data
    draw = torch.Generator().manual_seed(seed)
    live = use > 0
    for part in (~live).nonzero().flatten().chunk(8):
        if not len(part):
            break  # all live
        near = torch.ones(len(vectors), device=use.device)
        if live.any():
            near = torch.cdist(vectors, codes[live]).amin(dim=1) ** 2 + 1e-9
        codes[part] = vectors[
            torch.multinomial(near.cpu(), len(part), generator=draw).to(use.device)
        ]
        live[part] = True
    use.zero_()


def opponent(picture: torch.Tensor) -> torch.Tensor:
    """RGB (B, 3, H, W) in opponent colours."""
    return torch.einsum("oc,bchw->bohw", OPPONENT.to(picture.device), picture)


def rgb(picture: torch.Tensor) -> torch.Tensor:
    """Opponent colours (B, 3, H, W) in RGB."""
    back = torch.linalg.inv(OPPONENT).to(picture.device)
    return torch.einsum("co,bohw->bchw", back, picture)


@torch.no_grad()
def fold_colours(model: VQModel) -> None:
    """Makes a model of opponent colours one of RGB, exactly."""
    first, last = model.encoder.conv_in, model.decoder.conv_out
    colours = OPPONENT.to(first.weight.device)
    first.weight.copy_(torch.einsum("kohw,oc->kchw", first.weight, colours))
    back = torch.linalg.inv(colours)
    last.weight.copy_(torch.einsum("co,okhw->ckhw", back, last.weight))
    last.bias.copy_(back @ last.bias)


def psnr(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    return 10 * torch.log10(4 / F.mse_loss(y.clamp(-1, 1), x))


if __name__ == "__main__":
    stage_cli(train, STEPS, BATCH)
