"""The decoder learns from what the UNet paints, and nothing else changes."""

from __future__ import annotations

import csv
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from examples.scenes import decoder
from examples.scenes.world import SceneWorld
from export.vqgan_decoder import AS_PAINTED
from training import data, run
from training.distill import PHASE, alpha_sigma, ddim_scheduler
from training.loop import Trainer

Run = partial(run.Run, source=SceneWorld())
TRAINED = Path("checkpoints/scenes-64")
WEIGHTS = Path("vae", "diffusion_pytorch_model.safetensors")
CONFIG = Path("vae", "config.json")
ALPHAS_CUMPROD = ddim_scheduler().alphas_cumprod


@pytest.fixture(scope="module")
def painter() -> decoder.LatentPainter:
    return decoder.LatentPainter(TRAINED, torch.device("cpu"))


@pytest.fixture
def batch() -> data.Batch:
    return SceneWorld().sample(5, 6)


def latents(painter: decoder.LatentPainter, batch: data.Batch, seed: int = 0) -> torch.Tensor:
    return painter(batch, torch.Generator().manual_seed(seed))


@torch.no_grad()
def encoded(painter: decoder.LatentPainter, batch: data.Batch) -> torch.Tensor:
    return painter.vae.encode(batch.pictures).latents


def test_a_unet_without_error_paints_what_the_encoder_says(painter, batch, monkeypatch):
    x0 = encoded(painter, batch) * painter.vae.config.scaling_factor
    asked, rows = [], {2: [2, 5], 4: [1, 2, 4, 5]}  # that have two steps left, and one

    def right(x_t, t, encoder_hidden_states, timestep_cond):
        assert len(encoder_hidden_states) == len(timestep_cond) == len(x_t)
        asked.append(t.tolist())
        alpha, sigma = alpha_sigma(t, ALPHAS_CUMPROD)
        return SimpleNamespace(sample=(alpha * x_t - x0[rows[len(t)]]) / sigma)

    wanted = encoded(painter, batch)
    wanted[[0, 3]] = painter.vae.quantize(wanted)[0][[0, 3]]  # a third is its codes
    monkeypatch.setattr(painter, "_unet", right)
    torch.testing.assert_close(latents(painter, batch), wanted, rtol=0, atol=1e-5)
    assert asked == [[2 * PHASE - 1] * 2, [PHASE - 1] * 4]


def test_a_third_is_the_encoders_codes(painter, batch, monkeypatch):
    monkeypatch.setattr(
        painter, "_unet", lambda x_t, t, **_: SimpleNamespace(sample=torch.zeros_like(x_t))
    )
    found, wanted = latents(painter, batch), painter.vae.quantize(encoded(painter, batch))[0]
    same = torch.isclose(found, wanted).flatten(1).float().mean(1) == 1
    assert same.tolist() == [True, False, False] * 2
    assert not torch.isclose(latents(painter, batch, 1)[1:3], found[1:3]).flatten(1).all(1).any()


@pytest.mark.parametrize("row", [0, 2, 5])
def test_each_picture_is_painted_to_its_own_caption(painter, batch, row):
    captions = [*batch.captions]
    captions[row] = "a large pink ring on a white background"
    others = data.Batch(batch.pictures, captions)
    changed = ~torch.isclose(latents(painter, batch), latents(painter, others)).flatten(1).all(1)
    assert changed.nonzero().flatten().tolist() == [row] * (row > 0)  # the first is only encoded


@pytest.fixture
def trained(tmp_path):
    """Trains the decoder of a copy; gives the weights of its VQGAN."""

    def trained(name: str, stop_at: int | None = None) -> dict[str, torch.Tensor]:
        checkpoint, update = tmp_path / name, Trainer._update
        shutil.copytree(TRAINED, checkpoint)
        config = json.loads((checkpoint / CONFIG).read_text())
        del config[AS_PAINTED]  # as the stages before leave it
        (checkpoint / CONFIG).write_text(json.dumps(config))
        run = Run(checkpoint, tmp_path / f"{name}-runs", 12, 6, save_every=4)

        def stopped(trainer, loss_at):
            if trainer.step == stop_at:
                raise KeyboardInterrupt
            return update(trainer, loss_at)

        if stop_at:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(Trainer, "_update", stopped)
                with pytest.raises(KeyboardInterrupt):
                    decoder.train(run)
        decoder.train(run)
        return load_file(checkpoint / WEIGHTS)

    return trained


def test_encoder_and_codebook_stay(trained, tmp_path):
    before, after = load_file(TRAINED / WEIGHTS), trained("copy")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    config = json.loads((tmp_path / "copy" / CONFIG).read_text())
    assert config[AS_PAINTED] is True
    assert "_name_or_path" not in config
    folder = tmp_path / "copy-runs" / "decoder"
    curve = list(csv.DictReader((folder / "losses.csv").open()))
    assert 15 < float(curve[-1]["psnr"]) < 40
    assert (folder / "samples.png").exists()
    state = load_file(folder / "state.safetensors")
    assert torch.equal(after["post_quant_conv.weight"], state["ema.module.0.weight"])


@pytest.mark.slow
def test_a_decoder_that_was_stopped_ends_as_an_undisturbed_one(trained):
    torch.testing.assert_close(trained("stopped", 7), trained("whole"), rtol=0, atol=0)
