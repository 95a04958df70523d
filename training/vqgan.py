"""`python -m training.vqgan`: the VQGAN (arXiv:2012.09841) that turns latents into pixels.

First an autoencoder without quantisation; then the codebook starts from what the encoder
says, and codes that nothing uses are moved to where they are needed. Writes `vae/`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import VQModel
from torch.nn import functional as F

from training import data
from training.cli import stage_cli
from training.loop import Trainer

WARM_UP = 300  # steps before the codebook is used
REVIVE_EVERY = 100


def build() -> VQModel:
    torch.manual_seed(0)
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128), layers_per_block=1, norm_num_groups=8,
        latent_channels=8, vq_embed_dim=8, num_vq_embeddings=1024, sample_size=64,
    )  # fmt: skip


def train(checkpoint: Path, runs: Path, steps: int, batch: int) -> None:
    model = build()
    use = torch.zeros(model.config["num_vq_embeddings"])

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        scenes, _ = data.scenes(30_000_000 + step, batch)
        x = data.pictures(scenes)
        h = model.encode(x).latents
        if step >= WARM_UP and (step - WARM_UP) % REVIVE_EVERY == 0 and step < 0.8 * steps:
            revive(model, h, use, every_code=step == WARM_UP, seed=step)
        codebook = torch.zeros(())
        if step >= WARM_UP:
            z, codebook, (_, _, codes) = model.quantize(h)
            use.index_add_(0, codes.flatten(), torch.ones(codes.numel()))
        else:
            z = h
        y = model.decoder(model.post_quant_conv(z))
        pixel = F.l1_loss(y, x) + F.mse_loss(y, x)
        used = (use > 0).float().mean()
        return {"loss": pixel + codebook, "psnr": psnr(y, x), "codes_used": used}

    trained = Trainer(model, runs / "vqgan", steps, 1e-3, ema_decay=0.995).run(loss_at)
    scenes, _ = data.scenes(39_999_999, 512)
    with torch.no_grad():
        spread = trained.encode(data.pictures(scenes)).latents.std()
    trained.register_to_config(scaling_factor=1 / float(spread))
    trained.save_pretrained(checkpoint / "vae")


def revive(model: VQModel, h: torch.Tensor, use: torch.Tensor, every_code: bool, seed: int) -> None:
    """Moves unused codes (or all of them) onto encoder outputs `h` (B, 8, h, w)."""
    vectors = h.detach().permute(0, 2, 3, 1).flatten(0, 2)
    dead = torch.ones_like(use, dtype=torch.bool) if every_code else use == 0
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(vectors), (int(dead.sum()),), generator=draw)
    model.quantize.embedding.weight.data[dead] = vectors[chosen]
    use.zero_()


def psnr(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    return 10 * torch.log10(4 / F.mse_loss(y.clamp(-1, 1), x))


if __name__ == "__main__":
    stage_cli(train, steps=2000, batch=12)
