"""Every sampler against diffusers' scheduler of the same name, at every step."""

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinbrush.engine.samplers import (
    SAMPLERS,
    NoiseSchedule,
    Trajectory,
    guidance_embedding,
    trajectory,
)

SHAPE = (2, 4, 6, 6)
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
}
CLIPPING = {"ddim": {"clip_sample": False}, "lcm": {"clip_sample": False}}


def model(x, t):
    """Stands for a UNet: smooth in x and t, bounded."""
    return torch.tanh(0.7 * x + 0.3 * torch.sin(torch.as_tensor(t).float() / 100))


def schedule_of(config: dict) -> NoiseSchedule:
    exact = diffusers.DDIMScheduler(**config)
    return NoiseSchedule(
        alphas_cumprod=tuple(exact.alphas_cumprod.double().tolist()),
        prediction_type=config["prediction_type"],
        timestep_spacing=config["timestep_spacing"],
        steps_offset=config.get("steps_offset", 0),
    )


def our_step(path: Trajectory, i: int, x, clean, output, noise):
    a, b, c, d, p, q = (float(value) for value in path.table[i])
    return a * x + b * output + c * clean + d * noise, p * x + q * output


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("timestep_spacing", "extra"),
    [("leading", {"steps_offset": 1}), ("trailing", {}), ("linspace", {}),
     ("trailing", {"rescale_betas_zero_snr": True})],
)  # fmt: skip
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 20, 50])
def test_every_step_is_that_of_diffusers(sampler, prediction_type, timestep_spacing, extra, steps):
    if prediction_type == "epsilon" and "rescale_betas_zero_snr" in extra:
        pytest.skip("refused: the prediction of x_0 divides by zero")
    if (sampler, timestep_spacing) == ("euler", "linspace"):
        pytest.skip("diffusers leaves these timesteps fractional; here they are rounded")
    config = BETAS | extra | {
        "prediction_type": prediction_type, "timestep_spacing": timestep_spacing,
    }  # fmt: skip
    theirs = SCHEDULERS[sampler](**config, **CLIPPING.get(sampler, {}))
    theirs.set_timesteps(steps)
    path = trajectory(sampler, schedule_of(config), steps)
    assert path.timesteps.tolist() == [int(t) for t in theirs.timesteps]

    # diffusers' Euler starts from sigma 4096 there, of which float32 keeps three decimals.
    coarse = sampler == "euler" and "rescale_betas_zero_snr" in extra
    tolerance = 2e-3 if coarse else 1e-4
    draw = torch.Generator().manual_seed(steps)
    noise = torch.randn(SHAPE, generator=draw)
    x, clean = noise * path.initial_scale, torch.zeros(SHAPE)
    their_x = noise * theirs.init_noise_sigma
    for i, t in enumerate(theirs.timesteps):
        their_input = theirs.scale_model_input(their_x, t)
        torch.testing.assert_close(x, their_input, rtol=1e-4, atol=tolerance)
        output = model(their_input, t)
        seed = torch.Generator().manual_seed(1000 + i)
        if sampler == "lcm":
            their_x = theirs.step(output, t, their_x, generator=seed).prev_sample
        else:
            their_x = theirs.step(output, t, their_x).prev_sample
        fresh = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1000 + i))
        x, clean = our_step(path, i, x, clean, model(x, t), fresh)
        if sampler == "euler":
            sigma = theirs.sigmas[i + 1]
            their_latent = their_x / (sigma**2 + 1) ** 0.5
        else:
            their_latent = their_x
        torch.testing.assert_close(x, their_latent, rtol=1e-4, atol=tolerance)


@given(st.sampled_from(sorted(SAMPLERS)), st.integers(1, 50))
def test_an_exact_model_is_followed_to_its_picture(sampler, steps):
    """A model that knows x_0 leads every sampler there, whatever the number of steps."""
    config = BETAS | {"prediction_type": "sample", "timestep_spacing": "trailing"}
    path = trajectory(sampler, schedule_of(config), steps)
    picture = np.float32(0.37)
    x, clean = np.float32(1.5) * path.initial_scale, 0.0
    for i in range(path.steps):
        x, clean = our_step(path, i, x, clean, picture, noise=0.2)
    assert clean == pytest.approx(picture, abs=1e-4)
    if sampler != "ddim" or 1000 % steps == 0:  # else DDIM stops short, as in diffusers
        assert x == pytest.approx(picture, abs=1e-2)


@pytest.mark.parametrize(
    ("sampler", "steps", "named"),
    [("heun", 4, "sampler='heun'"), ("ddim", 0, "steps=0"), ("ddim", 51, "steps=51")],
)
def test_what_is_not_allowed_is_named(sampler, steps, named):
    config = BETAS | {"prediction_type": "epsilon", "timestep_spacing": "leading"}
    with pytest.raises(ValueError, match=named):
        trajectory(sampler, schedule_of(config), steps)


def test_epsilon_prediction_from_pure_noise_is_refused():
    with pytest.raises(ValueError, match="prediction_type='epsilon'"):
        NoiseSchedule(alphas_cumprod=(0.9, 0.0), prediction_type="epsilon")


@pytest.mark.parametrize("scale", [1.0, 3.5, 8.0])
def test_guidance_embedding_is_that_of_diffusers(scale):
    pipeline = diffusers.LatentConsistencyModelPipeline
    w = torch.tensor([scale - 1.0])
    theirs = pipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)
    np.testing.assert_allclose(guidance_embedding(scale, 256), theirs[0].numpy(), atol=1e-3)
