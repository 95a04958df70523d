"""What the benchmark of training losses measures."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import VQModel
from torch.nn import functional as F

from examples.scenes.benchmarks.losses import _measures, _untrained, edge_sharpness
from examples.scenes.quality import tasks
from examples.scenes.world import pictures as pictures_of

CHECKPOINT = Path("checkpoints/scenes-64")


def pictures(count: int) -> torch.Tensor:
    return pictures_of([task.scene for task in tasks(count)])


def test_edges_are_as_sharp_as_they_are_steep():
    true = pictures(6)
    assert edge_sharpness(true, true) == 1
    assert 0.3 < edge_sharpness(F.avg_pool2d(true, 3, 1, 1), true) < 0.7
    assert edge_sharpness(torch.zeros_like(true), true) == 0


def test_a_blurred_picture_measures_worse_than_a_true_one():
    true = pictures(6)
    blurred = F.avg_pool2d(true, 5, 1, 2)
    best, worse = _measures(true, true, tasks(6)), _measures(blurred, true, tasks(6))
    assert best["ssim"] == 1
    assert best["read_right"]["percent"] == 100
    assert worse["ssim"] < 0.99
    assert worse["psnr"] < 30 < best["psnr"]


def test_decoders_start_from_the_same_weights_behind_the_trained_encoder():
    one, other = _untrained(CHECKPOINT), _untrained(CHECKPOINT)
    x = pictures(2)
    with torch.no_grad():
        assert torch.equal(one.decode(one.encode(x).latents).sample,
                           other.decode(other.encode(x).latents).sample)  # fmt: skip
        assert one.encode(x).latents.std() > 0.1
    trained = VQModel.from_pretrained(CHECKPOINT / "vae")
    assert torch.equal(one.quantize.embedding.weight, trained.quantize.embedding.weight)
    assert not torch.equal(one.decoder.conv_in.weight, trained.decoder.conv_in.weight)
