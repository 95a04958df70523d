"""The world of the demo checkpoint, and training that can be killed at any moment."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.scenes.scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    OPPOSITE,
    SHAPES,
    Item,
    Scene,
    describe,
    middle_item,
    near_misses,
    relation,
    render,
    sample_scene,
)
from training.loop import Trainer

seeds = st.integers(0, 10**9)
NAME = re.compile(f"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")
MEANING = {
    "left": "left of", "right": "right of", "above": "above", "over": "above",
    "below": "below", "under": "below",
}  # fmt: skip


def holds(caption: str, scene: Scene) -> bool:
    """Whether what a caption says of objects and where they stand is so; sizes aside."""
    shown = {f"{item.colour} {item.shape}": item for item in scene.items}
    if any(match.group() not in shown for match in NAME.finditer(caption)):
        return False
    at = caption.find("between")
    if at >= 0:
        named = [match.group() for match in NAME.finditer(caption)]
        before = [match.group() for match in NAME.finditer(caption[:at])]
        middle = shown[(before or named)[-1]]
        return middle_item(scene) == scene.items.index(middle)
    for clause in re.split(", and |; ", caption):
        word = re.search("|".join(MEANING), clause)
        if word:
            first, second = NAME.finditer(clause)
            if not first.start() < word.start() < second.start():
                first, second = second, first  # "a square with a circle on its left"
            link = relation(shown[first.group()], shown[second.group()])
            if link != MEANING[word.group()]:
                return False
    return True


@given(seeds, st.sampled_from([1, 2, 3]), st.booleans())
@settings(max_examples=50)
def test_a_scene_is_drawn_where_its_truth_says(seed, count, held_out):
    scene = sample_scene(np.random.default_rng(seed), count, held_out)
    assert scene.held_out == held_out
    assert len(scene.items) == count
    picture = render(scene).astype(int)
    background = np.array(BACKGROUNDS[scene.background])
    assert np.abs(picture[0, 0] - background).max() <= 1
    for item in scene.items:
        near = picture[int(item.y) - 3 : int(item.y) + 4, int(item.x) - 3 : int(item.x) + 4]
        if item.shape == "ring":  # its centre is open
            edge = picture[int(item.y), min(63, int(item.x + 0.76 * item.radius))]
            near = edge[None, None]
        assert (np.abs(near - np.array(COLOURS[item.colour])).max(axis=-1) <= 1).any()


@given(seeds)
@settings(max_examples=50)
def test_a_caption_names_every_object_and_a_true_relation(seed):
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    text = describe(scene, rng)
    for item in scene.items:
        assert f"{item.colour} {item.shape}" in text
    if len(scene.items) == 1:
        assert not any(word in text for word in ("left", "right", "above", "below", "between"))
    assert holds(text, scene)


@pytest.mark.parametrize(
    ("caption", "true"),
    [
        ("a red circle left of a blue square", True),
        ("a red circle to the right of a blue square", False),
        ("above a red circle there is a blue square", False),
        ("a blue square with a red circle on its left", True),
        ("a red circle left of a pink square", False),
        ("a red circle left of a blue square, and a pink star left of the blue square", True),
        ("a red circle left of a blue square; a pink star is right of the blue square", False),
        ("a red circle and a blue square with a pink star between them", True),
        ("between a pink star and a blue square there is a red circle", False),
    ],
)
def test_captions_that_are_true_and_false(caption, true):
    circle, square = Item("circle", "red", "small", 8, 30), Item("square", "blue", "small", 56, 30)
    row = Scene((circle, square, Item("star", "pink", "small", 30, 31)), "black")
    assert holds(caption, row) == true


def test_the_random_start_leaves_the_average_soon(tmp_path):
    module = torch.nn.Linear(1, 1, bias=False)
    average = Trainer(module, tmp_path, 200, 0.1, ema_decay=0.9).ema
    for weight in (100.0, *[0.0] * 100):
        module.weight.data.fill_(weight)
        average.update_parameters(module)
    assert 0 < average.module.weight.item() < 1e-6
    module.weight.data.fill_(1.0)
    average.update_parameters(module)
    assert average.module.weight.item() == pytest.approx(0.1, abs=1e-3)


@given(seeds)
@settings(max_examples=200)
def test_near_misses_are_other_scenes_of_the_training_world(seed):
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    for other in near_misses(scene, rng):
        assert other != scene
        assert not other.held_out
        assert other.background == scene.background
        describe(other, rng)  # its objects stand in clear relations
        for a, b in itertools.combinations(other.items, 2):
            assert (a.shape, a.colour) != (b.shape, b.colour)
            assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius
        assert not (render(other) == render(scene)).all()
        assert not holds(describe(scene, rng), other)


def test_relations_are_opposite_both_ways():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = sample_scene(rng, 2).items
        assert relation(b, a) == OPPOSITE[relation(a, b)]


def test_every_shape_and_colour_loses_some_combinations_and_keeps_most():
    assert {shape for shape, _, _ in HELD_OUT} == set(SHAPES)
    assert {colour for _, colour, _ in HELD_OUT} == set(COLOURS)
    assert len(HELD_OUT) == len(SHAPES) * len(COLOURS) * 2 // 8


def train(folder, steps, stop_at=None):
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1)
    trainer = Trainer(module, folder, steps, 1e-2, save_every=2)
    done = 0

    def loss_at(step):
        nonlocal done
        if done == stop_at:
            raise KeyboardInterrupt
        done += 1
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return {"loss": (module(x) - x.sum(1, keepdim=True)).square().mean()}

    trainer.run(loss_at)
    return trainer


def test_a_run_that_was_killed_before_its_first_save_begins_its_curve_anew(tmp_path):
    (tmp_path / "losses.csv").write_text("step,loss\n10,1.0\n20,0.9\n")
    train(tmp_path, 10)
    assert [row.split(",")[0] for row in (tmp_path / "losses.csv").read_text().split()] == [
        "step",
        "10",
    ]


def test_a_save_of_another_model_is_named(tmp_path):
    train(tmp_path, 2)
    with pytest.raises(ValueError, match=f"--runs: {tmp_path}.* was saved from a model of other"):
        Trainer(torch.nn.Linear(4, 1), tmp_path, 2, 1e-2)


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path):
    whole = train(tmp_path / "whole", 12)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", 12, stop_at=7)
    resumed = train(tmp_path / "killed", 12)
    for a, b in zip(whole.module.parameters(), resumed.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for a, b in zip(whole.ema.parameters(), resumed.ema.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
