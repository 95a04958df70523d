"""What stages draw: the same for a seed, other things for another and for who goes on."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from examples.scenes import align, decoder, fit_fusion_head, reward, world
from examples.scenes.world import SceneWorld
from training import bert, clip, diffusion, distill, run, vqgan
from training.loop import Trainer

Run = partial(run.Run, source=SceneWorld())
TRAINED = Path("checkpoints/scenes-64").resolve()
TEACHER = TRAINED.with_name("scenes-64-teacher")


class Begun(Exception):
    """A stage came to its first steps."""


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Begins a stage; gives the losses of two steps and the weights that it starts from."""
    monkeypatch.setattr(world, "SCENES", 100)
    monkeypatch.setattr(reward, "PICTURES", 100)
    for stage, part in ((clip, "tokenizer"), (bert, "bert_tokenizer")):
        tokenizer = AutoTokenizer.from_pretrained(TRAINED / part)
        monkeypatch.setattr(stage, "trained_tokenizer", lambda *_, kept=tokenizer: kept)

    def stop(trainer, loss_at, *_):
        weights = torch.cat([p.detach().flatten() for p in trainer.module.parameters()])
        losses = [loss for step in range(2) for loss in loss_at(step).values()]
        raise Begun(torch.stack(losses).detach(), weights)

    monkeypatch.setattr(Trainer, "run", stop)

    def begin(stage, seed: int = 0, init: Path | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        with pytest.raises(Begun) as begun:
            stage.train(Run(TRAINED, tmp_path / "runs", 1, 4, init=init, seed=seed))
        return begun.value.args

    return begin


@pytest.mark.parametrize("stage", [clip, bert, vqgan, diffusion, reward])
def test_a_seed_is_of_the_random_weights_and_of_the_draws(begin, monkeypatch, stage):
    losses, weights = begin(stage)
    _, others = begin(stage, seed=1)
    assert not torch.isclose(weights, others).all()
    seeded = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda _: seeded(0))
    drawn, same = begin(stage, seed=1)
    assert torch.equal(same, weights)
    assert not torch.isclose(drawn, losses, rtol=0.005).all()


@pytest.mark.parametrize(
    ("stage", "source", "parts"),
    [
        (bert, TRAINED, ["bert_tokenizer", "bert"]),
        (vqgan, TRAINED, ["vae"]),
        (diffusion, TEACHER, ["fusion", "unet"]),
        (distill, TRAINED, ["unet"]),
        (
            fit_fusion_head,
            TRAINED,
            ["tokenizer", "text_encoder", "bert_tokenizer", "fusion", "bert"],
        ),
        (align, TRAINED, ["unet"]),
    ],
)
def test_who_goes_on_from_other_weights_draws_other_things(begin, tmp_path, stage, source, parts):
    begun = []
    for moved in (0.5, 0.501):  # one weight, so the same draws would cost the same
        init = tmp_path / str(moved)
        for part in parts:
            shutil.copytree(source / part, init / part)
        (file,) = (init / parts[-1]).glob("*.safetensors")
        weights = load_file(file)
        weights[min(weights)].flatten()[0] += moved
        save_file(weights, file, {"format": "pt"})
        begun.append(begin(stage, init=init))
    (losses, start), (others, nearby) = begun
    assert (start - nearby).abs().max() < 0.01
    assert not torch.isclose(losses, others, rtol=0.005).all()


@pytest.mark.parametrize("stage", [align, decoder])
def test_a_seed_is_of_the_draws_where_nothing_is_random_at_first(begin, stage):
    losses, weights = begin(stage)
    drawn, same = begin(stage, seed=1)
    assert torch.equal(same, weights)
    assert not torch.isclose(drawn, losses, rtol=0.005).all()
