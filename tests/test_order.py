"""BERT learns to say in what order two objects stand, and nothing else."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertModel, BertTokenizer

from export.checkpoint import load_part
from training import data, order
from training.run import Run
from training.scenes import (
    Item,
    Scene,
    describe,
    relation,
    sample_request,
    sample_scene,
    spelled_out,
)

TRAINED = Path("checkpoints/scenes-64")
WEIGHTS = Path("text_encoder_2", "model.safetensors")
STAR = Item("star", "red", "small", 12, 20)
SQUARE = Item("square", "blue", "large", 48, 32)
RING = Item("ring", "green", "small", 12, 44)


def turned(item: Item) -> Item:
    return Item(item.shape, item.colour, item.size, item.y, item.x)


@pytest.mark.parametrize(
    ("items", "caption", "spelled"),
    [
        (
            (STAR, SQUARE, RING),
            "a red star left of a blue square, and a ring to the left of the blue square",
            "a red star left of a blue square, and a ring below the red star",
        ),
        (
            (RING, SQUARE, STAR),
            "a square with a green ring to its left; a red star is left of the blue square",
            "a square with a green ring to its left; a red star is below the green ring",
        ),
        (
            tuple(map(turned, (STAR, SQUARE, RING))),
            "a red star above a blue square; a green ring is over the blue square on white",
            "a red star above a blue square; a green ring is right of the red star on white",
        ),
    ],
)
def test_what_a_caption_leaves_open_is_spelled_out(items, caption, spelled):
    assert spelled_out(Scene(items, "gray"), caption) == spelled


@given(st.integers(0, 10**9), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_only_what_is_open_is_spelled_out(seed, count):
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, count)
    caption = describe(scene, rng)
    spelled = spelled_out(scene, caption)
    links = [relation(scene.items[i], scene.items[1]) for i in (0, 2)] if count == 3 else [0, 1]
    if "between" in caption or links[0] != links[1]:
        assert spelled == caption
        return
    first, middle, last = (f"{item.colour} {item.shape}" for item in scene.items)
    begun, end = (caption.index(last) + len(last), spelled.index(last) + len(last))
    assert begun == end
    assert spelled[:end] == caption[:begun]
    assert re.match(f"( is)? (below|right of) the {first}", spelled[end:])
    assert f"the {middle}" not in spelled[end:]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoint"
    for part in ("tokenizer_2", "text_encoder_2"):
        shutil.copytree(TRAINED / part, folder / part)
    (folder / WEIGHTS).chmod(0o644)
    return folder


def run(checkpoint: Path, steps: int, **changed: object) -> Run:
    return Run(checkpoint, checkpoint.parent / "runs", steps, 24, **changed)


def curve(checkpoint: Path) -> list[dict[str, float]]:
    with (checkpoint.parent / "runs" / "order" / "losses.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_bert_is_to_say_what_it_says_where_it_is_spelled_out_up_to_the_last_name():
    captions = [
        "a small red star left of a blue square, and a ring to the left of the blue square",
        "a small red star left of a blue square",
    ]
    spelled = ["a small red star left of a blue square, and a ring below the red star", captions[1]]
    tokenizer = BertTokenizer.from_pretrained(TRAINED / "tokenizer_2")
    bert = load_part(TRAINED / "text_encoder_2", BertModel, add_pooling_layer=False)
    asked, told = (data.token_ids(tokenizer, texts) for texts in (captions, spelled))
    wanted, begun = order.targets(bert, asked, told)
    assert tokenizer.decode(asked[0][0][begun[0]], skip_special_tokens=True) == (
        "a small red star left of a blue square, and a ring"
    )
    assert not begun[1].any()
    with torch.no_grad():
        of_asked, of_told = order.states(bert, *asked), order.states(bert, *told)
    assert torch.equal(wanted[-1][begun], of_told[-1][begun])
    assert torch.equal(wanted[-1][~begun], of_asked[-1][~begun])
    assert torch.equal(wanted[:-1], of_asked[:-1])
    assert not torch.equal(wanted[-1][begun], of_asked[-1][begun])


def test_only_bert_changes_and_only_what_is_open(checkpoint):
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    order.train(run(checkpoint, 1))
    (first,) = curve(checkpoint)
    assert first["kept"] == 0  # it starts as what it is to stay
    assert first["said"] > 0
    written = {path for path in before if path.read_bytes() != before[path]}
    assert {path.relative_to(checkpoint) for path in written} <= {
        WEIGHTS, WEIGHTS.with_name("config.json"),
    }  # fmt: skip
    assert checkpoint / WEIGHTS in written
    assert {path for path in checkpoint.rglob("*") if path.is_file()} == set(before)


def test_bert_learns_it(checkpoint, monkeypatch):
    at = data.SceneBatches.at
    monkeypatch.setattr(data.SceneBatches, "at", lambda batches, _: at(batches, 0))
    order.train(run(checkpoint, 1))
    (before,) = curve(checkpoint)
    shutil.rmtree(checkpoint.parent / "runs")
    order.train(run(checkpoint, 60))
    after = curve(checkpoint)[-1]
    assert after["said"] < 0.5 * before["said"]
    assert after["kept"] < 0.1 * before["said"]


def test_the_checkpoints_bert_says_it():
    rng = np.random.default_rng(11)
    drawn = [sample_request(rng) for _ in range(300)]
    opened = [(scene, c, spelled_out(scene, c)) for scene, c in drawn if spelled_out(scene, c) != c]
    assert len(opened) > 20
    against = [
        told.replace("below the", "above the").replace("right of the", "left of the")
        for _, _, told in opened
    ]
    tokenizer = BertTokenizer.from_pretrained(TRAINED / "tokenizer_2")
    bert = load_part(TRAINED / "text_encoder_2", BertModel, add_pooling_layer=False)
    asked, told, other = (
        data.token_ids(tokenizer, texts)
        for texts in ([c for _, c, _ in opened], [t for _, _, t in opened], against)
    )
    wanted, begun = order.targets(bert, asked, told)
    unwanted, _ = order.targets(bert, asked, other)
    with torch.no_grad():
        said = order.states(bert, *asked)
    to_wanted, to_unwanted = (
        ((said - one)[-1].square().mean(-1) * begun).sum(1) for one in (wanted, unwanted)
    )
    assert (to_wanted < to_unwanted).float().mean() > 0.95


def test_who_does_not_know_what_is_in_pictures_cannot_tell_their_order(checkpoint):
    with pytest.raises(data.BadInput, match=r"--data: training\.order needs scenes"):
        order.train(run(checkpoint, 1, source=data.SceneWorld(told=False)))
