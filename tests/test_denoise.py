"""One step of many paintings: what repeats between calls, and noise that is drawn ahead."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from twinbrush.engine.denoise import Denoiser, Painting
from twinbrush.engine.guidance import Guidance
from twinbrush.engine.samplers import NoiseSchedule, trajectory

SHAPE = (2, 4, 4)
CALLS = 4


class Unet:
    """A network of one line; it can refuse a call, and keeps what it was called with."""

    def __init__(self):
        self.inputs: list[dict[str, np.ndarray]] = []
        self.refuse = False

    def run(self, model, inputs):
        if self.refuse:
            raise RuntimeError("no memory")
        self.inputs.append(dict(inputs))
        weight = inputs["encoder_hidden_states"].mean(axis=(1, 2))[:, None, None, None]
        return {"model_output": weight * inputs["sample"]}


@pytest.fixture
def unet() -> Unet:
    return Unet()


@pytest.fixture
def denoiser(unet) -> Iterator[Denoiser]:
    denoiser = Denoiser(unet)
    yield denoiser
    denoiser.close()


def painting(seed: int, rows: int = 1) -> Painting:
    schedule = NoiseSchedule(tuple(np.linspace(0.99, 0.01, 1000)))
    texts = np.random.default_rng(seed).random((rows, 3, 5), np.float32)
    return Painting(
        trajectory("euler_a", schedule, CALLS), {"encoder_hidden_states": texts},
        Guidance(3.0), np.random.default_rng(seed), SHAPE,
    )  # fmt: skip


def test_conditioning_is_stacked_once_for_the_same_paintings(denoiser, unet):
    paintings = [painting(0), painting(1, rows=2)]
    for group in (paintings, paintings, paintings[:1], paintings):
        denoiser.step("unet", group, buckets=(4,))
    first, second, third, fourth = (given["encoder_hidden_states"] for given in unet.inputs)
    assert second is first
    assert not first.flags.writeable
    assert len(first) == 4
    texts = [painted.conditioning["encoder_hidden_states"] for painted in paintings]
    np.testing.assert_array_equal(first, np.concatenate([*texts, texts[1][1:]]))
    np.testing.assert_array_equal(third, np.repeat(texts[0], 4, axis=0))
    np.testing.assert_array_equal(fourth, first)


def test_a_painting_does_not_depend_on_neighbours_or_on_failed_calls(denoiser, unet):
    alone, crowded = [painting(0), painting(1, rows=2)], [painting(0), painting(1, rows=2)]
    for painted in alone:
        for _ in range(CALLS):
            denoiser.step("unet", [painted])
    for call in range(CALLS):
        unet.refuse = True
        with pytest.raises(RuntimeError, match="no memory"):
            denoiser.step("unet", crowded)
        assert [painted.calls for painted in crowded] == [call, call]
        unet.refuse = False
        denoiser.step("unet", crowded)
    for one, other in zip(alone, crowded, strict=True):
        np.testing.assert_array_equal(one.latent.x, other.latent.x)
    assert not np.array_equal(alone[0].latent.x, alone[1].latent.x)


def test_first_noise_that_is_drawn_early_changes_nothing(denoiser):
    early, late = painting(5), painting(5)
    early.begin()
    early.begin()
    for painted in (early, late):
        for _ in range(CALLS):
            denoiser.step("unet", [painted])
    np.testing.assert_array_equal(early.latent.x, late.latent.x)


def test_a_call_can_change_when_its_turn_has_come(denoiser, unet):
    alone, together = [painting(0), painting(1)], [painting(0), painting(1)]
    gone = painting(2)
    for painted in alone:
        denoiser.step("unet", [painted])
    denoiser.step("unet", [together[0], gone], renew=lambda: together)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.latent.x, other.latent.x)
    assert (gone.calls, len(unet.inputs[-1]["sample"])) == (0, 2)
