"""Every sampler against diffusers' scheduler, at every call of the model."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from export.scheduler import read_schedule
from twinbrush.engine.samplers import (
    SAMPLERS,
    Latent,
    NoiseSchedule,
    Trajectory,
    advance,
    trajectory,
)
from twinbrush.engine.samplers.schedule import beta_quantile

SHAPE = (4, 4, 4)
STEPS = (1, 2, 4, 20, 50)
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SPACINGS = {
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "zero-snr": {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
}
NO_CLIPPING = {"clip_sample": False}
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, NO_CLIPPING),
    "ddpm": (diffusers.DDPMScheduler, NO_CLIPPING),
    "lcm": (diffusers.LCMScheduler, NO_CLIPPING),
    "tcd": (diffusers.TCDScheduler, NO_CLIPPING),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "lms": (diffusers.LMSDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "deis": (diffusers.DEISMultistepScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
}
SIGMA_SPACE = ("euler", "euler_a", "heun", "lms")  # their latents are x/alpha
NOISY = ("ddim", "ddpm", "lcm", "tcd", "euler_a", "dpmpp_2m_sde")
WITHOUT_ZERO_SNR = ("heun", "lms", "deis", "pndm")
WITHOUT_SAMPLE = ("euler_a", "pndm")  # diffusers refuses to predict x_0 there


def model(x: torch.Tensor, t) -> torch.Tensor:
    """Stands for a UNet: smooth in x and t, bounded, not linear."""
    return torch.tanh(0.7 * x + 0.3 * torch.sin(torch.as_tensor(t).float() / 100))


def draw(call: int) -> torch.Tensor:
    return torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1000 + call))


@lru_cache(maxsize=64)
def _schedule(class_name: str, options: tuple) -> NoiseSchedule:
    fields = read_schedule(class_name, dict(options))
    fields["alphas_cumprod"] = tuple(fields["alphas_cumprod"])
    return NoiseSchedule(**fields)


def schedule_of(scheduler: type, config: dict) -> NoiseSchedule:
    return _schedule(scheduler.__name__, tuple(sorted(config.items())))


def follow(sampler: str, config: dict, steps: int, tolerance: float = 1e-4, **options) -> None:
    """Runs both on the same noise; compares timesteps and the model's input at every call."""
    scheduler, extra = SCHEDULERS[sampler]
    config = BETAS | extra | config
    theirs = scheduler(**config)
    theirs.set_timesteps(steps)
    path = trajectory(sampler, schedule_of(scheduler, config), steps, **options)
    np.testing.assert_allclose(path.timesteps, theirs.timesteps.float(), atol=1e-3)
    assert path.steps == steps

    noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(steps))
    their_x = noise * theirs.init_noise_sigma
    latent = Latent.start(noise[0].numpy(), path)
    for i, t in enumerate(theirs.timesteps):
        their_input = theirs.scale_model_input(their_x, t)
        assert_close(latent.x, their_input, tolerance, i)
        seed = {"generator": torch.Generator().manual_seed(1000 + i)} if sampler in NOISY else {}
        eta = {"eta": options["eta"]} if "eta" in options else {}
        their_x = theirs.step(model(their_input, t), t, their_x, **seed, **eta).prev_sample
        x = torch.from_numpy(latent.x)[None]
        output = model(x, path.timesteps[i]).numpy()
        advance([latent], path.table[i][None], x.numpy(), output, lambda _, i=i: draw(i)[0].numpy())
    assert_close(latent.x, their_x, tolerance, path.calls)


def assert_close(ours: np.ndarray, theirs: torch.Tensor, tolerance: float, call: int) -> None:
    scale = max(1.0, float(theirs.abs().max()))
    error = float(np.abs(ours - theirs[0].numpy()).max())
    assert error <= tolerance * scale, f"call {call}: off by {error} of {scale}"


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_call_is_that_of_diffusers(sampler, prediction_type, spacing, steps):
    zero_snr = spacing == "zero-snr"
    if zero_snr and prediction_type == "epsilon":
        pytest.skip("refused: the prediction of x_0 divides by zero")
    if zero_snr and sampler in WITHOUT_ZERO_SNR:
        pytest.skip("diffusers' scheduler has no rescale_betas_zero_snr")
    if prediction_type == "sample" and sampler in WITHOUT_SAMPLE:
        pytest.skip("diffusers' scheduler refuses prediction_type sample")
    # diffusers starts from sigma 4096 there, of which float32 keeps three decimals.
    coarse = zero_snr and sampler in SIGMA_SPACE
    config = {"prediction_type": prediction_type} | SPACINGS[spacing]
    follow(sampler, config, steps, tolerance=2e-3 if coarse else 1e-4)


SIGMAS = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigmas", SIGMAS)
@pytest.mark.parametrize(
    "sampler", ["euler", "heun", "lms", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "deis"]
)
def test_sigma_schedules_are_those_of_diffusers(sampler, sigmas, prediction_type, steps):
    spacing = SPACINGS["leading" if prediction_type == "epsilon" else "trailing"]
    follow(sampler, SIGMAS[sigmas] | spacing | {"prediction_type": prediction_type}, steps)


@pytest.mark.parametrize("sigma_schedule", ["karras", "sgm_uniform"])
def test_a_request_may_choose_the_sigma_schedule(sigma_schedule):
    scheduler, _ = SCHEDULERS["euler"]
    plain = schedule_of(scheduler, BETAS | SPACINGS["leading"])
    chosen = {"karras": SIGMAS["karras"], "sgm_uniform": {"timestep_spacing": "trailing"}}
    config = BETAS | SPACINGS["leading"] | chosen[sigma_schedule]
    expected = trajectory("euler", schedule_of(scheduler, config), 7)
    actual = trajectory("euler", plain, 7, sigma_schedule=sigma_schedule)
    np.testing.assert_array_equal(actual.table, expected.table)
    assert actual.initial_scale == expected.initial_scale


OPTIONS = [
    ("dpmpp_2m", {"solver_order": 1}),
    ("dpmpp_2m", {"solver_order": 3}),
    ("dpmpp_2m", {"solver_type": "heun"}),
    ("dpmpp_2m", {"solver_order": 3, "lower_order_final": False}),
    ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
    ("dpmpp_2m", {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}),
    ("dpmpp_2m_sde", {"solver_order": 1}),
    ("dpmpp_2m_sde", {"solver_order": 3}),
    ("dpmpp_2m_sde", {"solver_type": "heun"}),
    ("dpmpp_2m_sde", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}),
    ("unipc", {"solver_order": 1}),
    ("unipc", {"solver_order": 3}),
    ("unipc", {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    ("unipc", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    ("unipc", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}),
    ("unipc", {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 10.0}),
    ("deis", {"solver_order": 1}),
    ("deis", {"solver_order": 3}),
    ("deis", {"solver_order": 3, "lower_order_final": False}),
    ("euler", {"final_sigmas_type": "sigma_min"}),
    ("euler", {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 10.0}),
    ("ddim", {"set_alpha_to_one": False}),
    ("pndm", {"set_alpha_to_one": True}),
    ("ddpm", {"variance_type": "fixed_large"}),
    ("lcm", {"timestep_scaling": 3.0, "original_inference_steps": 100}),
    ("ddim", {"beta_schedule": "linear", "num_train_timesteps": 500}),
]


@pytest.mark.parametrize("steps", [1, 2, 4, 20])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("sampler", "options"), OPTIONS, ids=str)
def test_options_of_a_scheduler_are_served(sampler, options, prediction_type, steps):
    follow(sampler, options | {"prediction_type": prediction_type}, steps)


@pytest.mark.parametrize("steps", [4, 5, 20, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_pndm_with_runge_kutta_steps(spacing, prediction_type, steps):
    config = {"skip_prk_steps": False, "prediction_type": prediction_type} | SPACINGS[spacing]
    follow("pndm", config, steps)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "tcd"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_eta_is_that_of_diffusers(sampler, spacing, eta):
    follow(sampler, {"prediction_type": "v_prediction"} | SPACINGS[spacing], 8, eta=eta)


def plain_schedule(**fields) -> NoiseSchedule:
    config = BETAS | {"prediction_type": "sample", "timestep_spacing": "trailing"}
    return replace(schedule_of(diffusers.DDIMScheduler, config), **fields)


def walk(path: Trajectory, output: np.ndarray, noise: np.ndarray, start: np.ndarray) -> Latent:
    latent = Latent.start(start, path)
    for row in path.table:
        advance([latent], row[None], latent.x[None], output[None], lambda _: noise)
    return latent


@given(st.sampled_from(sorted(set(SAMPLERS) - {"pndm"})), st.integers(1, 50))
def test_an_exact_model_is_followed_to_its_picture(sampler, steps):
    """A model that knows x_0 leads every sampler there, whatever the number of steps."""
    full = lambda value: np.full((1, 1, 1), value, np.float32)  # noqa: E731
    latent = walk(trajectory(sampler, plain_schedule(), steps), full(0.37), full(0.2), full(1.5))
    assert latent.clean.item() == pytest.approx(0.37, abs=1e-4)
    # DDIM stops short where steps do not divide 1000; DEIS and TCD end above noise 0.
    if sampler not in ("deis", "tcd") and (sampler != "ddim" or 1000 % steps == 0):
        assert latent.x.item() == pytest.approx(0.37, abs=1e-2)


def test_neighbours_of_other_samplers_never_change_a_latent():
    rng = np.random.default_rng(0)
    schedule = plain_schedule(prediction_type="v_prediction")
    paths = [trajectory(sampler, schedule, 12) for sampler in SAMPLERS]
    starts = [rng.standard_normal(SHAPE, np.float32) for _ in paths]
    outputs = rng.standard_normal((max(path.calls for path in paths), *SHAPE), np.float32)
    noise = rng.standard_normal(SHAPE, np.float32)
    together = [Latent.start(s, path) for s, path in zip(starts, paths, strict=True)]
    for call, output in enumerate(outputs):
        live = [i for i, path in enumerate(paths) if call < path.calls]
        latents = [together[i] for i in live]
        rows = np.stack([paths[i].table[call] for i in live])
        x = np.stack([latent.x for latent in latents])
        advance(latents, rows, x, np.stack([output] * len(live)), lambda _: noise)
    for path, start, latent in zip(paths, starts, together, strict=True):
        alone = Latent.start(start, path)
        for row, output in zip(path.table, outputs, strict=False):
            advance([alone], row[None], alone.x[None], output[None], lambda _: noise)
        np.testing.assert_array_equal(alone.x, latent.x)
        np.testing.assert_array_equal(alone.clean, latent.clean)


@pytest.mark.parametrize(
    ("sampler", "options", "steps", "calls", "ends"),
    [
        ("ddim", {}, 3, 3, [True, True, True]),
        ("heun", {}, 3, 5, [False, True, False, True, True]),
        ("heun", {}, 1, 1, [True]),
        ("pndm", {}, 3, 4, [False, True, True, True]),
        ("pndm", {}, 1, 1, [True]),
        ("pndm", {"skip_prk_steps": False}, 4, 13, [False, False, False, True] * 3 + [True]),
    ],
)
def test_a_trajectory_names_the_calls_that_end_a_step(sampler, options, steps, calls, ends):
    schedule = plain_schedule(prediction_type="epsilon", **options)
    path = trajectory(sampler, schedule, steps)
    assert path.calls == calls
    assert path.steps == steps
    assert path.ends_step.tolist() == ends


def test_noise_is_drawn_only_where_a_row_has_it():
    path = trajectory("lcm", plain_schedule(), 4)
    latent, draws = Latent.start(np.ones(SHAPE, np.float32), path), []
    for row in path.table:
        advance(
            [latent],
            row[None],
            latent.x[None],
            latent.x[None],
            lambda i: draws.append(i) or np.zeros(SHAPE, np.float32),
        )
    assert draws == [0, 0, 0]


@pytest.mark.parametrize(
    ("sampler", "steps", "options", "named"),
    [
        ("dpm_fast", 4, {}, "sampler='dpm_fast'"),
        ("ddim", 0, {}, "steps=0"),
        ("ddim", 51, {}, "steps=51"),
        ("ddim", 4, {"eta": 1.5}, "eta=1.5"),
        ("euler", 4, {"eta": 0.5}, "eta=0.5 is invalid for sampler 'euler'"),
        ("ddim", 4, {"sigma_schedule": "karras"}, "sigma_schedule='karras'.*'ddim'"),
        ("lcm", 4, {"sigma_schedule": "sgm_uniform"}, "sigma_schedule='sgm_uniform'.*'lcm'"),
        ("euler", 4, {"sigma_schedule": "linear"}, "sigma_schedule='linear'"),
        ("pndm", 4, {}, "prediction_type='sample'"),
    ],
)
def test_what_is_not_allowed_is_named(sampler, steps, options, named):
    with pytest.raises(ValueError, match=named):
        trajectory(sampler, plain_schedule(), steps, **options)


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
def test_more_steps_than_a_model_was_distilled_with_are_refused(sampler):
    schedule = plain_schedule(original_inference_steps=8)
    assert trajectory(sampler, schedule, 8).steps == 8
    with pytest.raises(ValueError, match=r"steps=9 .* at most 8.*original_inference_steps"):
        trajectory(sampler, schedule, 9)


def test_too_few_steps_for_runge_kutta_are_refused():
    schedule = plain_schedule(prediction_type="epsilon", skip_prk_steps=False)
    with pytest.raises(ValueError, match=r"steps=3 .*'pndm'.*at least 4"):
        trajectory("pndm", schedule, 3)


def test_options_without_finite_coefficients_are_refused():
    schedule = plain_schedule(lower_order_final=False)
    with pytest.raises(ValueError, match="lower_order_final=False requires"):
        trajectory("unipc", schedule, 4)


def test_epsilon_prediction_from_pure_noise_is_refused():
    with pytest.raises(ValueError, match="prediction_type='epsilon'"):
        NoiseSchedule(
            alphas_cumprod=(0.9, 0.0), prediction_type="epsilon", original_inference_steps=1
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("solver_order", 4),
        ("solver_type", "rk4"),
        ("final_sigmas_type", "max"),
        ("variance_type", "learned"),
        ("sigma_schedule", "cosine"),
        ("alphas_cumprod", (float("nan"), 0.5)),
    ],
)
def test_a_schedule_refuses_what_no_row_expresses(field, value):
    with pytest.raises(ValueError, match=field):
        plain_schedule(**{field: value})


def test_beta_quantiles_are_those_of_scipy():
    shares = np.linspace(0, 1, 50)
    expected = scipy.stats.beta.ppf(shares, 0.6, 0.6)
    np.testing.assert_allclose(beta_quantile(shares), expected, atol=1e-9)
