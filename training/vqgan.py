"""`python -m training.vqgan`: the VQGAN (arXiv:2012.09841) that turns latents into pixels.

First an autoencoder whose latents, of unit variance, are noisy: what must survive the noise is
spread over all channels in steps as large as the noise, which is what a UNet can paint. Then the
encoder stays as it is, so a UNet may already learn its latents, and a codebook takes the noise's
place: it starts from what the encoder says, and codes that nothing uses move to where the error
is largest. The decoder learns to do with codes, from reconstruction, perceptual and adversarial
losses. Writes `vae/` after each half.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import VQModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from training import data
from training.cli import stage_cli
from training.loop import Trainer
from training.sheets import grid
from training.vqgan_losses import (
    OPPONENT,
    Discriminator,
    Perception,
    adaptive_weight,
    hinge,
    opponent,
    psnr,
    reconstruction,
    rgb,
)

STEPS, BATCH = 4400, 32
SHOWN = 39_999_998  # seed of the pictures of samples.png
NOISE = 0.3  # standard deviation; finer steps than this a UNet need not paint
REVIVE_EVERY = 100  # steps
WATCHING = 0.2  # share of the steps that the discriminator learns before it is listened to


@dataclass(frozen=True)
class Weights:
    """Of the terms beside the reconstruction; 0 leaves a term out."""

    perceptual: float = 0.1
    adversarial: float = 0.1


class Autoencoder(nn.Module):
    """The model and the scale of its latents; it sees and gives opponent colours."""

    def __init__(self, side: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = VQModel(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 32, 64, 96), layers_per_block=1, norm_num_groups=8,
            latent_channels=8, vq_embed_dim=8, num_vq_embeddings=1024, sample_size=side,
            scaling_factor=1.0,
        )  # fmt: skip
        self.scale = nn.BatchNorm2d(self.model.config["latent_channels"], affine=False)


class Quantised(nn.Module):
    """What learns once the encoder is done: codebook, decoder, and the decoder's judge.

    `use` counts how often each code was used since the last revival.
    """

    def __init__(self, vae: VQModel):
        super().__init__()
        self.quantize = vae.quantize
        self.decoder = nn.Sequential(vae.post_quant_conv, vae.decoder)
        self.discriminator = Discriminator()
        self.register_buffer("use", torch.zeros(vae.config["num_vq_embeddings"]))
        self.requires_grad_(True)


def autoencoder(
    folder: Path,
    steps: int,
    batch: int,
    bf16: bool = False,
    device: torch.device = data.CPU,
    source: data.Source = data.SCENES,
    save_every: int = 100,
) -> VQModel:
    """A model whose latents have unit variance and stand noise; its codebook says nothing yet."""
    stage = Autoencoder(source.side).to(device)
    model = stage.model
    batches = source.batches(30_000_000, batch, device)
    shown = source.sample(SHOWN, 8).pictures.to(device)

    def loss_at(step: int) -> dict[str, Tensor]:
        x = batches.at(step).pictures
        z = stage.scale(model.encode(opponent(x)).latents.float())
        draw = torch.Generator().manual_seed(step)
        z = z + NOISE * torch.randn(z.shape, generator=draw).to(device)
        y = rgb(model.decoder(model.post_quant_conv(z)).float())
        return {"loss": reconstruction(y, x), "psnr": psnr(y, x)}

    def samples(averaged: Autoencoder) -> Image.Image:
        inner = averaged.model
        z = inner.encode(opponent(shown)).latents
        return compared(shown, rgb(inner.decoder(inner.post_quant_conv(z))))

    trainer = Trainer(stage, folder, steps, 1.5e-3, 0.998, save_every, bf16=bf16)
    trained = trainer.run(loss_at, batches, samples)
    fold_scale(trained)
    fold_colours(trained.model)
    return trained.model


def refine(
    vae: VQModel,
    tower: CLIPVisionModelWithProjection,
    weights: Weights,
    folder: Path,
    steps: int,
    batch: int,
    bf16: bool = False,
    device: torch.device = data.CPU,
    source: data.Source = data.SCENES,
    save_every: int = 100,
) -> VQModel:
    """Trains codebook and decoder of `vae`, whose encoder stays; gives `vae` back."""
    vae.requires_grad_(False).eval().to(device)
    vae.quantize.legacy = False
    stage = Quantised(vae).to(device)
    perception = Perception(tower.to(device))
    batches = source.batches(40_000_000, batch, device)
    shown = source.sample(SHOWN, 8).pictures.to(device)
    last = vae.decoder.conv_out.weight

    def loss_at(step: int) -> dict[str, Tensor]:
        x = batches.at(step).pictures
        if step % REVIVE_EVERY == 0 and step < 0.9 * steps:
            revive(vae, stage.use, step, source)
        with torch.no_grad():
            z = vae.encode(x).latents.float()
        with torch.autocast(device.type, enabled=False):
            z, codebook, (_, _, codes) = stage.quantize(z)
        stage.use.index_add_(0, codes.flatten(), torch.ones(codes.numel(), device=device))
        y = stage.decoder(z.detach()).float()
        loss = reconstruction(y, x)
        if weights.perceptual:
            down, right = np.random.default_rng(step).integers(8, size=2).tolist()
            loss = loss + weights.perceptual * perception(y, x, (down, right))
        parts = {"psnr": psnr(y, x), "codes_used": (stage.use > 0).float().mean()}
        if weights.adversarial:
            fooling, parts["judging"] = hinge(stage.discriminator, y, x)
            if step >= WATCHING * steps:
                balance = adaptive_weight(loss, fooling, last)
                loss = loss + weights.adversarial * balance * fooling
            loss = loss + parts["judging"]
        return {"loss": loss + codebook, **parts}

    def samples(averaged: Quantised) -> Image.Image:
        z, _, _ = averaged.quantize(vae.encode(shown).latents)
        return compared(shown, averaged.decoder(z))

    trainer = Trainer(stage, folder, steps, 1e-3, 0.998, save_every, bf16=bf16)
    trained = trainer.run(loss_at, batches, samples)
    vae.quantize = trained.quantize
    vae.post_quant_conv, vae.decoder = trained.decoder
    return vae


@torch.no_grad()
def revive(vae: VQModel, use: Tensor, seed: int, source: data.Source = data.SCENES) -> None:
    """Moves codes that nothing used onto encoder outputs, in eight rounds.

    Outputs are drawn in proportion to their squared distance from the codes that live
    (k-means++), so that rare details get codes and flat backgrounds do not take them all.
    """
    z = vae.encode(source.sample(seed, 128).pictures.to(use.device)).latents.float()
    vectors = z.permute(0, 2, 3, 1).flatten(0, 2)
    codes = vae.quantize.embedding.weight.data
    draw = torch.Generator().manual_seed(seed)
    live = use > 0
    for part in (~live).nonzero().flatten().chunk(8):
        if not len(part):
            break  # all live
        near = torch.ones(len(vectors), device=use.device)
        if live.any():
            near = torch.cdist(vectors, codes[live]).amin(dim=1) ** 2 + 1e-9
        chosen = torch.multinomial(near.cpu(), len(part), generator=draw)
        codes[part] = vectors[chosen.to(use.device)]
        live[part] = True
    use.zero_()


@torch.no_grad()
def fold_scale(stage: Autoencoder) -> None:
    """Makes the model give latents of unit variance by itself, exactly."""
    last, scale = stage.model.quant_conv, stage.scale.eval()
    last.weight.mul_((scale.running_var + scale.eps).rsqrt()[:, None, None, None])
    last.bias.copy_(scale(last.bias[None, :, None, None]).flatten())


@torch.no_grad()
def fold_colours(model: VQModel) -> None:
    """Makes a model of opponent colours one of RGB, exactly."""
    first, last = model.encoder.conv_in, model.decoder.conv_out
    colours = OPPONENT.to(first.weight.device)
    first.weight.copy_(torch.einsum("kohw,oc->kchw", first.weight, colours))
    back = torch.linalg.inv(colours)
    last.weight.copy_(torch.einsum("co,okhw->ckhw", back, last.weight))
    last.bias.copy_(back @ last.bias)


def compared(originals: Tensor, painted: Tensor) -> Image.Image:
    """Originals (N, 3, S, S) above what was made of them."""
    return grid(torch.cat([originals, painted]), columns=len(originals))


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
    rest = (bf16, device, source, save_every)
    vae = autoencoder(runs / "autoencoder", steps // 2, batch, *rest)
    vae.save_pretrained(checkpoint / "vae")
    tower = CLIPVisionModelWithProjection.from_pretrained(checkpoint / "image_encoder")
    refine(vae, tower, Weights(), runs / "vqgan", steps - steps // 2, batch, *rest)
    vae.save_pretrained(checkpoint / "vae")


if __name__ == "__main__":
    stage_cli(train, STEPS, BATCH)
