"""The reader on true and spoilt pictures, and what counts as right."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from harness import open_engine
from hypothesis import example, given, settings
from hypothesis import strategies as st

from examples.scenes import quality
from examples.scenes.benchmarks import autoencoder
from examples.scenes.quality import Task, interval, score
from examples.scenes.reader import NO_SHAPE, Reading, read
from examples.scenes.scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    SHAPES,
    Item,
    Scene,
    middle_item,
    render,
    sample_scene,
)

RED = Item("circle", "red", "large", 18, 32)
BLUE = Item("square", "blue", "small", 46, 32)
PROMPT = "a large red circle left of a small blue square on black"
SCENE = Scene((RED, BLUE), "black")
TASK = Task(PROMPT, SCENE)


@given(st.integers(0, 10**9), st.sampled_from([1, 2, 3]))
@settings(max_examples=60)
def test_true_pictures_are_read_right(seed, count):
    scene = sample_scene(np.random.default_rng(seed), count)
    reading = read(render(scene))
    assert reading.background == scene.background
    assert sorted(i.kind for i in reading.items) == sorted(i.kind for i in scene.items)
    for item in scene.items:
        near = [i for i in reading.items if abs(i.x - item.x) < 1 and abs(i.y - item.y) < 1]
        assert [i.kind for i in near] == [item.kind]


@pytest.mark.parametrize("colour", ["cyan", "blue"])
def test_objects_that_touch_are_told_apart(colour):
    circle = Item("circle", colour, "large", 26.4, 25.9)
    square = Item("square", "blue", "large", 41.9, 49.3)
    scene = Scene((circle, square), "brown")
    assert sorted(i.kind for i in read(render(scene)).items) == [circle.kind, square.kind]


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_noise_and_blur_do_not_confuse_the_reader(background):
    scene = Scene((RED, BLUE), background)
    picture = render(scene).astype(float)
    picture = (picture + np.roll(picture, 1, 0) + np.roll(picture, 1, 1)) / 3
    picture += np.random.default_rng(0).normal(0, 6, picture.shape)
    reading = read(picture.clip(0, 255).astype(np.uint8))
    assert {i.kind for i in reading.items} == {RED.kind, BLUE.kind}


def test_an_empty_picture_has_no_objects_and_a_blot_no_shape():
    empty = render(Scene((), "gray"))
    assert read(empty) == Reading("gray", ())
    empty[5:60, 30:36] = empty[30:34, 20:60] = (214, 39, 40)
    empty[5:9, 30:60] = (214, 39, 40)
    assert [i.shape for i in read(empty).items] == [NO_SHAPE]


@given(st.integers(0, 10**9), st.sampled_from([1, 4, 16]))
@example(292023403, 1)  # its median is the background
@settings(max_examples=30)
def test_any_picture_can_be_read(seed, blot):
    noise = np.random.default_rng(seed).integers(0, 256, (64 // blot, 64 // blot, 3), np.uint8)
    reading = read(noise.repeat(blot, 0).repeat(blot, 1))
    for item in reading.items:
        assert item.shape in (*SHAPES, NO_SHAPE)
        assert item.colour in COLOURS


def wrong(reading: Reading) -> set[str]:
    return {name for name, value in asdict(score(TASK, reading)).items() if value is False}


@pytest.mark.parametrize(
    ("shown", "attributes"),
    [
        ([RED, BLUE], set()),
        ([], {"painted", "count", "shape", "colour", "size", "colour_binding", "relation"}),
        ([RED], {"count", "shape", "colour", "size", "colour_binding", "relation"}),
        ([RED, BLUE, replace(BLUE, y=10)], {"count", "shape", "colour"}),
        ([replace(RED, x=46), replace(BLUE, x=18)], {"relation"}),
        ([replace(RED, colour="blue"), replace(BLUE, colour="red")],
         {"size", "colour_binding", "relation"}),
        ([replace(RED, size="small"), BLUE], {"size"}),
        ([replace(RED, shape="ring"), BLUE], {"shape", "size", "colour_binding", "relation"}),
    ],
)  # fmt: skip
def test_each_kind_of_mistake_is_counted_as_what_it_is(shown, attributes):
    assert wrong(Reading("black", tuple(shown))) == attributes
    assert wrong(Reading("white", tuple(shown))) == attributes | {"background"}


def test_what_a_prompt_does_not_say_is_not_asked():
    task = Task("a red circle", Scene((RED,), "black"))
    one = score(task, Reading("white", (replace(RED, size="small"),)))
    assert one.all_correct
    assert (one.size, one.background, one.relation) == (None, None, None)


def test_between_asks_for_the_middle():
    green = Item("star", "green", "small", 32, 32)
    scene = Scene((RED, green, BLUE), "gray")
    task = Task("a star between a circle and a square", scene)
    mirrored = (replace(RED, x=BLUE.x), green, replace(BLUE, x=RED.x))
    column = tuple(replace(item, x=item.y, y=item.x) for item in scene.items)
    for shown in (scene.items, mirrored, column):
        assert score(task, Reading("gray", shown)).relation
    for place in ({"x": 60}, {"x": 4}):
        assert not score(task, Reading("gray", (RED, BLUE, replace(green, **place)))).relation
    assert not score(task, Reading("gray", (RED, green))).relation


def test_prompts_are_held_out_and_of_one_two_and_three_objects():
    tasks = quality.tasks(30)
    assert all(any(i.kind in HELD_OUT for i in task.scene.items) for task in tasks)
    assert [len(task.scene.items) for task in tasks[:6]] == [1, 2, 3, 1, 2, 3]
    assert quality.tasks(5) == tasks[:5]
    seen = quality.tasks(30, held_out=False)
    assert not any(task.scene.held_out for task in seen)


def test_prompts_of_one_between_two_are_true_and_not_held_out():
    tasks = quality.between_tasks(40)
    assert all(" between " in f" {task.prompt} " for task in tasks)
    assert not any(task.scene.held_out for task in tasks)
    assert len({task.prompt for task in tasks}) == 40
    assert quality.between_tasks(5) == tasks[:5]
    for task in tasks:
        assert score(task, Reading(task.scene.background, task.scene.items)).all_correct
        a, b = (i for k, i in enumerate(task.scene.items) if k != middle_item(task.scene))
        traded = {a: replace(a, x=b.x, y=b.y), b: replace(b, x=a.x, y=a.y)}
        turned = tuple(traded.get(item, item) for item in task.scene.items)
        assert score(task, Reading(task.scene.background, turned)).relation


def test_intervals_are_wilsons():
    assert interval(90, 100) == (82.6, 94.5)
    assert interval(0, 10) == (0.0, 27.8)


def test_the_command_ends_with_its_summary(repository, tmp_path, monkeypatch, capsys):
    out = tmp_path / "quality.json"
    monkeypatch.setattr(quality, "read", lambda picture: read(np.tile(picture, (2, 2, 1))))
    monkeypatch.setattr(quality, "reader_accuracy", lambda tasks: 100.0)
    with pytest.raises(SystemExit, match="--repository: its pictures have 32 pixels a side"):
        quality.main(repository, n=3, out=out)
    monkeypatch.setattr(quality, "SIDE", 32)
    with pytest.raises(SystemExit, match=r"error: --repository: .*nowhere"):
        quality.main(tmp_path / "nowhere", n=3, out=out)
    with pytest.raises(SystemExit, match="error: sampler='dpm_fast' is invalid"):
        quality.main(repository, n=3, steps=2, sampler="dpm_fast", guidance=-1, out=out)
    quality.main(repository, n=6, steps=2, sampler="", guidance=-1, out=out)
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    result = json.loads(out.read_text())
    assert summary == result["summary"]
    counts = {name: row["all_correct"]["n"] for name, row in result["table"].items()}
    assert counts == {**dict.fromkeys(quality.NAMES.values(), 2), "all": 6, "same_side": 1}
    assert list(summary) == [
        "reader_accuracy", "one_object", "two_objects", "three_objects", "relation",
        "colour_binding", "steps", "n",
    ]  # fmt: skip
    assert (summary["steps"], summary["n"]) == (2, 6)
    quality.main(repository, n=3, between=True, steps=2, sampler="", guidance=-1, out=out)
    result = json.loads(out.read_text())
    assert result["prompts"] == "between"
    assert result["table"]["three_objects"]["all_correct"]["n"] == 3
    assert result["summary"]["one_object"] is None


def test_the_autoencoder_is_measured(tiny, tmp_path, capsys):
    out = tmp_path / "autoencoder.json"
    autoencoder.main(tiny, n=6, out=out)
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n"] == 6
    assert 0 < result["summary"]["psnr"] < 20  # random weights show nothing
    assert 0 < result["summary"]["codes_used"] <= 100
    assert result["read_right"]["one_object"]["n"] == 2


def test_an_error_of_the_engine_is_not_a_picture(repository):
    engine = open_engine(repository)
    engine.close()
    with pytest.raises(Exception, match="shutting down"):
        quality.paint(engine, ["a red circle"])
