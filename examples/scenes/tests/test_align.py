"""The reward model's truth and faults, and what the aligned UNet learns from."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.scenes import align, reward
from examples.scenes.scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    SHAPES,
    SIDE,
    SIZES,
    Item,
    Scene,
    describe,
    middle_item,
    sample_crowd,
    sample_request,
    sample_scene,
)
from examples.scenes.world import SceneWorld
from training import data, distill
from training.latents import noised
from twinbrush.engine.samplers import NoiseSchedule, ddim

CIRCLE = Item("circle", "red", "small", 12, 30)
SQUARE = Item("square", "blue", "small", 52, 34)
STAR = Item("star", "pink", "small", 32, 33)
ROW = Scene((CIRCLE, SQUARE), "black")
TOLD = "a small red circle to the left of a small blue square on black"
ALPHAS_CUMPROD = distill.ddim_scheduler().alphas_cumprod
SURE = 12.0  # a logit


def read(*scenes: Scene) -> reward.Readout:
    """A readout that is sure of scenes."""
    truth = reward.truth_of(scenes, SIDE // 8)
    chosen = []
    for i, (name, choices) in enumerate(reward.ATTRIBUTES.items()):
        asked = truth.attributes[..., i].clamp(min=0)
        chosen.append(SURE * torch.nn.functional.one_hot(asked, len(choices)).movedim(-1, 1))
        assert name == reward.Readout._fields[1 + i]
    background = torch.nn.functional.one_hot(truth.background, len(BACKGROUNDS))
    return reward.Readout(SURE * (2 * truth.centre - 1), *chosen, SURE * background.float())


def faults(scene: Scene, wanted: Scene = ROW, caption: str = TOLD) -> dict[str, float]:
    found = reward.faults(read(scene), [wanted], [caption])
    return {name: round(float(fault), 2) for name, fault in found.items() if fault > 0.02}


@given(st.integers(0, 10**9))
@settings(max_examples=100)
def test_a_crowd_keeps_apart_inside_and_to_the_training_world(seed):
    scene = sample_crowd(np.random.default_rng(seed))
    assert len(scene.items) <= 4
    for item in scene.items:
        assert item.kind not in HELD_OUT
        assert item.radius + 2 <= min(item.x, item.y, SIDE - item.x, SIDE - item.y)
    for a, b in itertools.combinations(scene.items, 2):
        assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_crowds_hold_doubles_and_any_number():
    rng = np.random.default_rng(0)
    crowds = [sample_crowd(rng) for _ in range(300)]
    assert {len(scene.items) for scene in crowds} == {0, 1, 2, 3, 4}
    doubled = [len({item.kind for item in s.items}) < len(s.items) for s in crowds]
    assert 0.1 < np.mean(doubled) < 0.6


def test_requests_name_no_size_of_what_training_shows_in_one_alone():
    rng = np.random.default_rng(0)
    asked = [sample_request(rng) for _ in range(400)]
    alone = {(colour, shape) for shape, colour, _ in HELD_OUT}
    shown = unsized = 0
    for scene, caption in asked:
        assert not scene.held_out
        for item in scene.items:
            assert f"{item.colour} {item.shape}" in caption
            sized = f"{item.size} {item.colour} {item.shape}" in caption
            if (item.colour, item.shape) in alone:
                shown += 1
                assert not sized
            else:
                unsized += not sized
    assert shown > 10
    assert 0.1 < unsized / (sum(len(scene.items) for scene, _ in asked) - shown) < 0.3
    counts = np.bincount([len(scene.items) for scene, _ in asked])
    assert 0 < counts[1] < counts[2] < counts[3]
    in_a_row = [middle_item(scene) is not None for scene, _ in asked if len(scene.items) == 3]
    assert 0.15 < np.mean(in_a_row) < 0.4


def test_who_is_asked_for_requests_hears_what_they_are_true_of():
    batches = SceneWorld().batches(7, 5, data.CPU, captions_only=True)
    batch = batches.at(2)
    rng = np.random.default_rng(7 + 2)
    assert [*zip(batch.truth, batch.captions, strict=True)] == [
        sample_request(rng) for _ in range(5)
    ]
    assert batch.pictures.shape == (0, 3, SIDE, SIDE)
    captions_alone = SceneWorld(with_truth=False).batches(7, 5, data.CPU, True).at(2)
    assert captions_alone.captions == batch.captions
    assert captions_alone.truth == []


def test_truth_lies_in_the_cells_of_an_object():
    truth = reward.truth_of([Scene((SQUARE,), "gray"), Scene((), "white")], 8)
    assert truth.centre[0].nonzero().tolist() == [[4, 6]]  # of y 34 and x 52, in cells of 8
    assert truth.centre[1].sum() == 0
    kind = [SHAPES.index("square"), list(COLOURS).index("blue"), list(SIZES).index("small")]
    assert truth.attributes[0, 4, 6].tolist() == kind
    assert truth.attributes[0, 0, 0].tolist() == [reward.IGNORED] * 3
    assert truth.background.tolist() == [list(BACKGROUNDS).index(b) for b in ("gray", "white")]


def test_a_right_reading_costs_nothing_and_a_wrong_one_does():
    truth = reward.truth_of([ROW], 8)
    right = reward.reading_losses(read(ROW), truth)
    assert float(right["loss"]) < 0.01
    assert float(right["count"]) < 0.01
    for wrong, part in (
        (Scene((CIRCLE, replace(SQUARE, shape="ring")), "black"), "shape"),
        (Scene((CIRCLE, replace(SQUARE, colour="pink")), "black"), "colour"),
        (Scene((CIRCLE, replace(SQUARE, size="large")), "black"), "size"),
        (Scene((CIRCLE, SQUARE), "gray"), "background"),
        (Scene((CIRCLE,), "black"), "centre"),
    ):
        losses = reward.reading_losses(read(wrong), truth)
        assert float(losses[part]) > 1, part
        assert float(losses["loss"]) > 1


@pytest.mark.parametrize(
    ("shown", "at_fault"),
    [
        (ROW, set()),
        (Scene((CIRCLE,), "black"), {"missing", "count", "relation"}),
        (Scene((CIRCLE, SQUARE, STAR), "black"), {"count"}),
        (Scene((CIRCLE, replace(CIRCLE, x=30), SQUARE), "black"), {"count"}),
        (Scene((CIRCLE, replace(SQUARE, colour="pink")), "black"), {"missing", "relation"}),
        (Scene((CIRCLE, replace(SQUARE, size="large")), "black"), {"missing", "relation"}),
        (Scene((replace(CIRCLE, x=52), replace(SQUARE, x=12)), "black"), {"relation"}),
        (Scene((CIRCLE, SQUARE), "gray"), {"background"}),
    ],
)
def test_faults_are_what_a_picture_lacks_of_its_caption(shown, at_fault):
    found = faults(shown)
    assert at_fault - {"relation"} <= found.keys() <= at_fault


def test_what_a_caption_does_not_say_is_no_fault():
    shown = Scene((CIRCLE, replace(SQUARE, size="large")), "gray")
    assert not faults(shown, caption="a small red circle to the left of a blue square")


@pytest.mark.parametrize(
    ("places", "right"),
    [
        (((10, 32), (54, 32), (32, 32)), True),
        (((32, 54), (32, 10), (32, 32)), True),
        (((10, 32), (32, 32), (54, 32)), False),
    ],
)
def test_between_holds_in_a_row_and_in_a_column(places, right):
    wanted = Scene((CIRCLE, SQUARE, STAR), "black")
    items = [replace(i, x=x, y=y) for i, (x, y) in zip(wanted.items, places, strict=True)]
    caption = "a small pink star between a small red circle and a small blue square"
    assert faults(Scene(tuple(items), "black"), wanted, caption).keys() == (
        set() if right else {"relation"}
    )


def test_who_follows_the_faults_comes_to_what_captions_say():
    rng = np.random.default_rng(3)
    scenes = [sample_scene(rng) for _ in range(12)]
    captions = [describe(scene, rng) for scene in scenes]
    torch.manual_seed(0)
    cells = SIDE // 8
    logits = [0.1 * torch.randn(12, choices, cells, cells) for choices in reward.CHOICES]
    logits = [one.requires_grad_() for one in logits]
    optimizer = torch.optim.Adam(logits, 0.2)

    def found():
        centre, *attributes, background = logits
        now = reward.Readout(centre[:, 0], *attributes, background.mean((2, 3)))
        return reward.faults(now, scenes, captions)

    before = {name: fault.item() for name, fault in found().items()}
    for _ in range(150):
        optimizer.zero_grad()
        torch.stack([*found().values()]).sum().backward()
        optimizer.step()
    after = {name: fault.item() for name, fault in found().items()}
    assert all(after[name] < 0.1 * before[name] for name in before), (before, after)
    counts = logits[0].sigmoid().sum((1, 2, 3))
    wanted = torch.tensor([float(len(scene.items)) for scene in scenes])
    assert (counts - wanted).abs().max() < 0.2


class Rounding:
    """A VQGAN whose codes are whole numbers."""

    config = SimpleNamespace(scaling_factor=0.5)

    def quantize(self, z):
        assert not torch.is_autocast_enabled("cpu")
        return z + (z.round() - z).detach(), None, None


def test_the_reward_model_is_shown_finished_codes_and_noisy_latents_by_level():
    ends = [torch.full((1, 2, 3, 3), 1.1 + k, requires_grad=True) for k in range(align.PHASES)]
    path = [align.Phase(torch.zeros(1), torch.zeros(1), x_end) for x_end in ends]
    with torch.autocast("cpu", torch.bfloat16):
        shown = align.readable(Rounding(), path)
    assert [one.flatten()[0].item() for one in shown] == [
        4.0,
        pytest.approx(3.1),
        pytest.approx(2.1),
    ]
    assert len(shown) == reward.LEVELS
    for one in shown:
        one.sum().backward()
    assert [x_end.grad is not None for x_end in ends] == [False, True, True, True]


def test_the_reward_model_learns_from_latents_as_noisy_as_the_students():
    generator = torch.Generator().manual_seed(2)
    x0, noise = torch.randn(2, reward.LEVELS, 2, 3, 3, generator=generator)
    level, amount = torch.arange(reward.LEVELS), torch.zeros(reward.LEVELS, 1, 1, 1)
    shown = reward.left_at(Rounding(), x0, level, noise, amount, ALPHAS_CUMPROD)
    assert torch.equal(shown[0], (2 * x0[0]).round() / 2)
    ends = distill.end_of_phase(align.timesteps(x0.device)).flip(0)
    for k in range(1, reward.LEVELS):
        expected = noised(x0[k : k + 1], noise[k : k + 1], ALPHAS_CUMPROD[ends[k : k + 1]])
        torch.testing.assert_close(shown[k : k + 1], expected)
    faulty = reward.left_at(Rounding(), x0, level, noise, amount + 1, ALPHAS_CUMPROD)
    assert torch.equal(faulty[0], (2 * (x0[0] + noise[0])).round() / 2)
    assert torch.equal(faulty[1:], shown[1:])


def test_a_level_is_told_apart():
    torch.manual_seed(0)
    reader = reward.SceneReader(channels=2, width=16, blocks=1)
    x_t = torch.randn(1, 2, 4, 4).expand(reward.LEVELS, -1, -1, -1)
    read = reader(x_t, torch.arange(reward.LEVELS)).centre
    assert len({round(one.sum().item(), 3) for one in read}) == reward.LEVELS


def test_only_gradients_that_are_too_long_are_cut():
    gradient = torch.zeros(4, 2, 1, 1)
    gradient[0, 0], gradient[1, 1] = 100.0, 0.5 * align.LONGEST / 4
    cut = align.shortened(gradient)
    assert float(cut[0].norm()) == pytest.approx(align.LONGEST / 4)
    assert torch.equal(cut[1:], gradient[1:])


class Halves:
    """A UNet that says `weight` of its latents."""

    def __init__(self):
        self.weight = torch.tensor(0.5, requires_grad=True)

    def __call__(self, x_t, t, **asked):
        assert asked == {"told": 1}
        return SimpleNamespace(sample=self.weight * x_t + 0.001 * t[:, None, None, None])


def painted(unet: Halves) -> list[align.Phase]:
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return align.paint(unet, noise, {"told": 1}, ALPHAS_CUMPROD, slice(1))


def test_pictures_are_painted_as_they_are_served():
    schedule = NoiseSchedule(
        tuple(ALPHAS_CUMPROD.tolist()), "v_prediction", timestep_spacing="trailing"
    )
    served = ddim(schedule, align.PHASES)
    assert align.timesteps(torch.device("cpu")).tolist() == served.timesteps.tolist()
    path = painted(Halves())
    x = path[0].x_t
    for t, (a, b), phase in zip(served.timesteps, served.table[:, :2], path, strict=True):
        v = 0.5 * x + 0.001 * t
        torch.testing.assert_close(phase.x_t, x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(phase.v, v, rtol=1e-4, atol=1e-4)
        x = a * x + b * v
        torch.testing.assert_close(phase.x_end, x, rtol=1e-4, atol=1e-4)


def test_each_step_answers_for_its_own_end_and_the_first_for_the_second():
    path = painted(Halves())
    assert [phase.x_t.requires_grad for phase in path] == [False, True, False, False]
    for phase in path:
        (gradient,) = torch.autograd.grad(phase.x_end.sum(), phase.v, retain_graph=True)
        assert gradient.abs().min() > 0
    (gradient,) = torch.autograd.grad(path[1].x_end.sum(), path[0].v)
    assert gradient[1:].abs().min() > 0
    assert gradient[0].abs().max() == 0  # this one the teacher teaches


@pytest.mark.parametrize("k", range(align.PHASES))
def test_the_gradient_at_where_a_step_ends_is_cut(monkeypatch, k):
    lengths = []
    for longest in (1e9, align.LONGEST):
        monkeypatch.setattr(align, "LONGEST", longest)
        unet = Halves()
        (1e6 * painted(unet)[k].x_end).mean().backward()
        lengths.append(float(unet.weight.grad.abs()))
    assert 0 < lengths[1] < 1e-3 * lengths[0]


def test_the_student_is_taught_where_the_teacher_ends_a_phase():
    x0, noise = torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    asked = []

    def teacher(x_t, t, told):
        assert told == 1
        asked.append(t.tolist())
        return SimpleNamespace(sample=noised(noise, -x0, ALPHAS_CUMPROD[t]))

    t = align.timesteps(torch.device("cpu"))
    x_t = noised(x0, noise, ALPHAS_CUMPROD[t])
    v = align.teacher_velocity(teacher, x_t, t, {"told": 1}, ALPHAS_CUMPROD)
    assert asked[:2] == [[999, 749, 499, 249], [949, 699, 449, 199]]
    assert len(asked) == align.FINER
    torch.testing.assert_close(v, noised(noise, -x0, ALPHAS_CUMPROD[t]), rtol=1e-2, atol=1e-2)
