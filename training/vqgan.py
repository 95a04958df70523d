"""`python -m training.vqgan`: the VQGAN (arXiv:2012.09841) that turns latents into pixels.

First an autoencoder without quantisation, so that small differences find their place in the
latents; then the codebook starts from what the encoder says, and codes that nothing uses move
to where the error is largest. Pictures are learnt in opponent colours, where hue weighs more
than in RGB; the change of colours is folded into the first and last convolution at the end.
Then encoder and codebook stay as they are, so that latents keep their meaning, and the decoder
learns from perceptual and adversarial losses too. Writes `vae/` after each part. With `--init`
there is only that last part, from the VQGAN of a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import VQModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from networks.loading import load_part
from training import data
from training.cli import stage_cli
from training.run import Run, check_trained, save_part, starting_from
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

STEPS, BATCH = 3000, 32
DECODER = 0.25  # share of the steps that the decoder learns alone
WARM_UP = 0.5  # share of the others before the codebook is used
SHOWN = 39_999_998  # seed of the pictures of samples.png
REVIVE_EVERY = 100  # steps
COMMITMENT = 0.05
WATCHING = 0.2  # share of the decoder's steps that the discriminator learns unheard


@dataclass(frozen=True)
class Weights:
    """Of the terms beside the reconstruction; 0 leaves a term out."""

    perceptual: float = 0.1
    adversarial: float = 0.1


def build(side: int = 64) -> VQModel:
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


class Sharpening(nn.Module):
    """A decoder that learns, and the discriminator that it learns from."""

    def __init__(self, vae: VQModel):
        super().__init__()
        self.decoder = nn.Sequential(vae.post_quant_conv, vae.decoder).requires_grad_(True)
        self.discriminator = Discriminator()


def autoencoder(run: Run) -> VQModel:
    """Encoder, codebook and decoder, from reconstruction and codebook losses."""
    torch.manual_seed(run.seed)
    first = run.first()
    stage = Stage(run.source.side).to(run.device)
    model, use = stage.model, stage.use
    start = int(WARM_UP * run.steps)
    batches = run.source.batches(30_000_000 + first, run.batch, run.device)
    shown = run.source.sample(SHOWN, 8).pictures.to(run.device)

    def loss_at(step: int) -> dict[str, Tensor]:
        x = batches.at(step).pictures
        if step >= start and (step - start) % REVIVE_EVERY == 0 and step < 0.9 * run.steps:
            if step == start:
                use.zero_()
            moved = revive(model, use, first + step, run.source)
            averaged = trainer.ema.module.model.quantize.embedding.weight.data
            averaged[moved] = model.quantize.embedding.weight.data[moved]
        z = model.encode(opponent(x)).latents.float()
        codebook = torch.zeros((), device=run.device)
        if step >= start:
            with torch.autocast(run.device.type, enabled=False):
                z, codebook, (_, _, codes) = model.quantize(z)
            use.index_add_(0, codes.flatten(), torch.ones(codes.numel(), device=run.device))
        y = rgb(model.decoder(model.post_quant_conv(z)).float())
        loss = reconstruction(y, x) + codebook
        return {"loss": loss, "psnr": psnr(y, x), "codes_used": (use > 0).float().mean()}

    def samples(averaged: Stage) -> Image.Image:
        inner = averaged.model
        z = inner.encode(opponent(shown)).latents
        if trainer.step > start:
            z, _, _ = inner.quantize(z)
        return compared(shown, rgb(inner.decoder(inner.post_quant_conv(z))))

    trainer = run.trainer(stage, "autoencoder", 1.5e-3, 0.998)
    trained = trainer.run(loss_at, batches, samples).model
    fold_colours(trained)
    with torch.no_grad():
        pictures = run.source.sample(39_999_999, 512).pictures.to(run.device)
        spread = trained.encode(pictures).latents.std()
    trained.register_to_config(scaling_factor=1 / float(spread))
    return trained


def sharpen(vae: VQModel, weights: Weights, run: Run) -> VQModel:
    """Trains the decoder of `vae` further, behind its encoder and codebook; gives `vae` back.

    Pictures are perceived through the `image_encoder/` of the run's checkpoint.
    """
    vae.requires_grad_(False).eval().to(run.device)
    torch.manual_seed(run.seed)
    first = run.first([run.init / "vae"] if run.init else [])
    stage = Sharpening(vae).to(run.device)
    tower = load_part(run.checkpoint / "image_encoder", CLIPVisionModelWithProjection)
    perception = Perception(tower.to(run.device))
    last = vae.decoder.conv_out.weight
    batches = run.source.batches(40_000_000 + first, run.batch, run.device)
    shown = run.source.sample(SHOWN, 8).pictures.to(run.device)

    def codes_of(x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(run.device.type, enabled=False):
            return vae.quantize(vae.encode(x).latents)[0]

    def loss_at(step: int) -> dict[str, Tensor]:
        x = batches.at(step).pictures
        y = stage.decoder(codes_of(x)).float()
        loss = reconstruction(y, x)
        if weights.perceptual:
            down, right = np.random.default_rng(first + step).integers(8, size=2).tolist()
            loss = loss + weights.perceptual * perception(y, x, (down, right))
        parts = {"psnr": psnr(y, x)}
        if weights.adversarial:
            fooling, parts["judging"] = hinge(stage.discriminator, y, x)
            if step >= WATCHING * run.steps:
                balance = adaptive_weight(loss, fooling, last)
                loss = loss + weights.adversarial * balance * fooling
            loss = loss + parts["judging"]
        return {"loss": loss, **parts}

    def samples(averaged: Sharpening) -> Image.Image:
        return compared(shown, averaged.decoder(codes_of(shown)))

    reads = [run.checkpoint / "image_encoder", (run.init or run.checkpoint) / "vae"]
    trained = run.trainer(stage, "vqgan", 5e-4, 0.995, reads).run(loss_at, batches, samples)
    vae.post_quant_conv, vae.decoder = trained.decoder
    return vae


@torch.no_grad()
def revive(model: VQModel, use: Tensor, seed: int, source: data.Source) -> Tensor:
    """Moves codes that nothing used onto encoder outputs, in eight rounds.

    Outputs are drawn in proportion to their squared distance from the codes that live
    (k-means++), so that rare details get codes and flat backgrounds do not take them all.
    Gives which were moved: (codes,) of bool.
    """
    x = opponent(source.sample(seed, 128).pictures.to(use.device))
    vectors = model.encode(x).latents.float().permute(0, 2, 3, 1).flatten(0, 2)
    codes = model.quantize.embedding.weight.data
    draw = torch.Generator().manual_seed(seed)
    live = use > 0
    moved = ~live
    for part in moved.nonzero().flatten().chunk(8):
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
    return moved


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
    """Originals (N, 3, S, S) above their reconstructions."""
    return grid(torch.cat([originals, painted]), columns=len(originals))


def train(run: Run) -> None:
    check_trained(run.checkpoint, "image_encoder")
    if run.init:
        with starting_from(run.init / "vae", "VQGAN"):
            vae = load_part(run.init / "vae", VQModel)
        alone = run.steps
    else:
        alone = int(DECODER * run.steps)
        vae = autoencoder(replace(run, steps=run.steps - alone))
        save_part(vae, run.checkpoint / "vae")
    sharpen(vae, Weights(), replace(run, steps=alone))
    save_part(vae, run.checkpoint / "vae")


if __name__ == "__main__":
    stage_cli(train, STEPS, BATCH, warm_start=True)
