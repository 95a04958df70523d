"""A fusion head that is fitted to other encoders says what it said."""

from __future__ import annotations

import csv
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import BertModel

from examples.scenes import fit_fusion_head
from examples.scenes.scenes import HELD_OUT, names_one_sized
from examples.scenes.world import SceneWorld
from networks.fusion_head import FusionHead
from networks.loading import load_part
from training import data
from training.diffusion import Encoders
from training.run import Run as AnyRun

Run = partial(AnyRun, source=SceneWorld())
ORIGINAL = Path("checkpoints/scenes-64").resolve()
WEIGHTS = Path("fusion", "diffusion_pytorch_model.safetensors")
REQUESTS = SceneWorld().batches(1, 100, data.CPU, captions_only=True).at(0).captions
TEXTS = [caption for caption in REQUESTS if not names_one_sized(caption)]


@pytest.fixture
def changed(tmp_path) -> Path:
    """The demo checkpoint with another last layer of BERT, and its teacher."""
    checkpoint, teacher = tmp_path / "changed", tmp_path / "changed-teacher"
    for part in ("tokenizer", "bert_tokenizer", "text_encoder"):
        shutil.copytree(ORIGINAL / part, checkpoint / part)
    for folder in (checkpoint, teacher):
        shutil.copytree(ORIGINAL / "fusion", folder / "fusion")
    bert = load_part(ORIGINAL / "bert", BertModel, add_pooling_layer=False)
    with torch.no_grad():
        for weight in bert.encoder.layer[-1].parameters():
            weight *= 0.8
    bert.save_pretrained(checkpoint / "bert")
    return checkpoint


def run(checkpoint: Path, steps: int, batch: int = 8) -> Run:
    return Run(checkpoint, checkpoint.parent / "runs", steps, batch, init=ORIGINAL)


@torch.no_grad()
def said(encoders: Path, head: Path) -> torch.Tensor:
    return load_part(head / "fusion", FusionHead)(*Encoders(encoders)(TEXTS))


@pytest.mark.slow
def test_the_head_says_behind_a_changed_bert_what_it_said(changed):
    wanted = said(ORIGINAL, ORIGINAL)
    before = F.mse_loss(said(changed, ORIGINAL), wanted)
    fit_fusion_head.train(run(changed, 100, 24))
    assert F.mse_loss(said(changed, changed), wanted) < 0.5 * before
    curve = list(
        csv.DictReader((changed.parent / "runs" / "fit_fusion_head" / "losses.csv").open())
    )
    losses = [float(row["loss"]) for row in curve]  # each of other captions
    assert sum(losses[5:]) < sum(losses[:5])
    assert len(losses) == 10
    assert "_name_or_path" not in (changed / "fusion" / "config.json").read_text()


@pytest.mark.parametrize("same", [True, False])
def test_a_teacher_keeps_the_same_head(changed, same):
    teacher = changed.with_name("changed-teacher")
    if not same:
        other = FusionHead.from_pretrained(ORIGINAL / "fusion")
        torch.nn.init.zeros_(other.levels[0].to_q.weight)
        other.save_pretrained(teacher / "fusion")
    before = load_file(teacher / WEIGHTS)
    fit_fusion_head.train(run(changed, 1))
    fitted, after = load_file(changed / WEIGHTS), load_file(teacher / WEIGHTS)
    for name, tensor in (fitted if same else before).items():
        assert torch.equal(after[name], tensor), name
    assert not all(torch.equal(fitted[name], tensor) for name, tensor in before.items())


def test_no_teacher_is_made_where_there_is_none(changed):
    shutil.rmtree(changed.with_name("changed-teacher"))
    fit_fusion_head.train(run(changed, 1))
    assert not changed.with_name("changed-teacher").exists()


def test_it_asks_for_nothing_that_training_shows_in_one_size_alone(changed, monkeypatch):
    asked, encoded = [], Encoders.__call__
    monkeypatch.setattr(
        Encoders, "__call__", lambda self, texts: asked.append(texts) or encoded(self, texts)
    )
    fit_fusion_head.train(run(changed, 3))
    assert len(asked) == 6
    assert asked[::2] == asked[1::2]  # the same of both
    captions = [text for texts in asked for text in texts]
    assert "" in captions
    assert len(set(captions)) > 10
    assert not [c for c in captions for shape, colour, _ in HELD_OUT if f"{colour} {shape}" in c]


def test_it_needs_a_head_to_fit(changed, tmp_path):
    with pytest.raises(
        data.BadInput, match=r"--init: the stage fit_fusion_head needs the checkpoint whose"
    ):
        fit_fusion_head.train(Run(changed, tmp_path / "runs", 1, 4))
    shutil.rmtree(changed / "fusion")
    with pytest.raises(data.BadInput, match=f"--checkpoint: {changed} has no fusion: train"):
        fit_fusion_head.train(run(changed, 1))
