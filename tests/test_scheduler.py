"""Scheduler configs: every option is served, refused by name, or without effect."""

import inspect
import json

import diffusers
import numpy as np
import pytest

from export.scheduler import (
    SAMPLER_OF,
    SERVED,
    check_clipping,
    check_defaults,
    choose_sampler,
    family_defaults,
    parse_defaults,
    read_schedule,
    unused_options,
)
from networks.loading import CheckpointError
from twinbrush.engine.samplers import NoiseSchedule, trajectory


@pytest.mark.parametrize("class_name", SAMPLER_OF)
def test_every_option_of_a_served_scheduler_is_accounted_for(class_name):
    parameters = inspect.signature(getattr(diffusers, class_name)).parameters
    assert set(parameters) <= SERVED


@pytest.mark.parametrize("class_name", SAMPLER_OF)
def test_a_saved_scheduler_of_diffusers_is_read(class_name):
    config = dict(getattr(diffusers, class_name)().config) | {"clip_sample": False}
    if class_name not in ("DDIMScheduler", "DDPMScheduler", "HeunDiscreteScheduler",
                          "LCMScheduler", "TCDScheduler"):  # fmt: skip
        config.pop("clip_sample")
    fields = read_schedule(class_name, config)
    fields["alphas_cumprod"] = tuple(fields["alphas_cumprod"])
    assert trajectory(SAMPLER_OF[class_name], NoiseSchedule(**fields), 4).steps == 4


@pytest.mark.parametrize(
    ("class_name", "option", "value"),
    [
        ("DDIMScheduler", "clip_sample", True),
        ("DDIMScheduler", "beta_start", float("nan")),
        ("DDIMScheduler", "beta_end", None),
        ("DDIMScheduler", "beta_schedule", "mystery"),
        ("HeunDiscreteScheduler", "trained_betas", [0.001] * 100),
        ("DDIMScheduler", "prediction_type", "flow_prediction"),
        ("PNDMScheduler", "prediction_type", "sample"),
        ("DPMSolverMultistepScheduler", "lambda_min_clipped", -5.1),
        ("DPMSolverMultistepScheduler", "algorithm_type", "dpmsolver"),
        ("DPMSolverMultistepScheduler", "solver_order", 4),
        ("DPMSolverMultistepScheduler", "variance_type", "learned_range"),
        ("DPMSolverMultistepScheduler", "use_lu_lambdas", True),
        ("DPMSolverMultistepScheduler", "thresholding", True),
        ("UniPCMultistepScheduler", "disable_corrector", [0]),
        ("UniPCMultistepScheduler", "predict_x0", False),
        ("UniPCMultistepScheduler", "use_flow_sigmas", True),
        ("EulerDiscreteScheduler", "interpolation_type", "log_linear"),
        ("EulerDiscreteScheduler", "timestep_type", "continuous"),
        ("DDPMScheduler", "variance_type", "learned"),
    ],
)
def test_an_option_that_no_row_expresses_is_refused_by_name(class_name, option, value):
    with pytest.raises(CheckpointError, match=option):
        read_schedule(class_name, {option: value})


def test_clipping_that_no_file_turns_off_is_refused():
    """As a pipeline of SDXL would clip; one of Stable Diffusion turns it off by itself."""
    unsaid = {name: value for name, value in SD15.items() if name != "clip_sample"}
    for class_name in ("DDIMScheduler", "DDPMScheduler"):
        with pytest.raises(CheckpointError, match="has no clip_sample, which is True by default"):
            check_clipping(class_name, unsaid)
        check_clipping(class_name, SD15)
    check_clipping("EulerDiscreteScheduler", unsaid)


def test_algorithm_type_chooses_the_sampler():
    name = "DPMSolverMultistepScheduler"
    assert choose_sampler(name, {}) == "dpmpp_2m"
    assert choose_sampler(name, {"algorithm_type": "sde-dpmsolver++"}) == "dpmpp_2m_sde"


def test_a_sampler_replaces_an_unknown_scheduler():
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    with pytest.raises(CheckpointError, match=r"DPMSolverSDEScheduler.*--sampler NAME"):
        read_schedule("DPMSolverSDEScheduler", config)
    fields = read_schedule("DPMSolverSDEScheduler", config, "euler")
    assert fields["alphas_cumprod"][0] == pytest.approx(1 - 0.00085)
    with pytest.raises(CheckpointError, match="sampler='plms'"):
        read_schedule("DPMSolverSDEScheduler", config, "plms")


SD15 = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True,
}  # fmt: skip


@pytest.mark.parametrize("former", ["PNDMScheduler", "DDIMScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("class_name", SAMPLER_OF)
def test_a_replaced_scheduler_has_the_noise_and_timesteps_of_diffusers(former, class_name):
    known = inspect.signature(getattr(diffusers, former)).parameters
    old = getattr(diffusers, former)(**{n: v for n, v in SD15.items() if n in known})
    config = json.loads(old.to_json_string())
    loaded = getattr(diffusers, former).from_config(config)  # it knows what the file says
    new = getattr(diffusers, class_name).from_config(loaded.config)
    sampler = SAMPLER_OF[class_name]
    fields = read_schedule(former, config, sampler)
    np.testing.assert_allclose(fields["alphas_cumprod"], new.alphas_cumprod, rtol=1e-6)
    if sampler == "pndm":
        new.config.skip_prk_steps = True
    new.set_timesteps(4)
    got = trajectory(sampler, NoiseSchedule(**fields | {
        "alphas_cumprod": tuple(fields["alphas_cumprod"])
    }), 4).timesteps  # fmt: skip
    np.testing.assert_allclose(got, new.timesteps.numpy()[: len(got)], rtol=1e-5)


@pytest.mark.parametrize("former", ["EulerDiscreteScheduler", None])
@pytest.mark.parametrize("class_name", [
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler",
    "LMSDiscreteScheduler", "UniPCMultistepScheduler",
])  # fmt: skip
def test_bounds_of_sigmas_count_where_a_constructor_does_not_name_them(former, class_name):
    """As in diffusers, which keeps them when one scheduler is made from another's file."""
    bounds = {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0}
    config = SD15 | bounds | {"timestep_spacing": "linspace"}
    new = getattr(diffusers, class_name).from_config(config)
    new.set_timesteps(4)
    sampler = SAMPLER_OF[class_name]
    fields = read_schedule(former or class_name, config, sampler if former else None)
    schedule = NoiseSchedule(**fields | {"alphas_cumprod": tuple(fields["alphas_cumprod"])})
    np.testing.assert_allclose(trajectory(sampler, schedule, 4).timesteps, new.timesteps, 1e-6)
    for value in (-0.1, "low", float("inf")):
        with pytest.raises(CheckpointError, match=r"sigma_min=.* must be a number of at least 0"):
            read_schedule(class_name, config | {"sigma_min": value})


def test_options_that_a_replaced_scheduler_leaves_are_listed():
    config = SD15 | {"_class_name": "PNDMScheduler", "set_alpha_to_one": True}
    assert unused_options("PNDMScheduler", config, "euler_a") == {
        "set_alpha_to_one": True, "skip_prk_steps": True,
    }  # fmt: skip
    assert unused_options("PNDMScheduler", config, "lcm") == {"skip_prk_steps": True}
    clipped = SD15 | {"clip_sample": True, "clip_sample_range": 2.0}
    assert unused_options("DDIMScheduler", clipped, "euler")["clip_sample"] is True


@pytest.mark.parametrize(
    ("option", "value", "sampler"),
    [("clip_sample", True, "lcm"), ("interpolation_type", "log_linear", "euler"),
     ("beta_end", float("nan"), "euler"), ("prediction_type", "flow_prediction", "dpmpp_2m")],
)  # fmt: skip
def test_shared_options_of_a_replaced_scheduler_are_checked(option, value, sampler):
    with pytest.raises(CheckpointError, match=option):
        read_schedule("DDIMScheduler", SD15 | {option: value}, sampler)


def test_what_a_unet_was_trained_with_stays_when_its_scheduler_is_replaced():
    expected = diffusers.DDIMScheduler(prediction_type="sample").alphas_cumprod
    fields = read_schedule("DDIMScheduler", {"prediction_type": "sample"}, "lcm")
    np.testing.assert_allclose(fields["alphas_cumprod"], expected, rtol=1e-6)
    assert fields["prediction_type"] == "sample"
    for unknown in ("FlowMatchEulerDiscreteScheduler", "SomeScheduler"):
        with pytest.raises(CheckpointError, match=r"cannot replace .* no beta_start"):
            read_schedule(unknown, {"shift": 3.0}, "euler")


@pytest.mark.parametrize(
    ("sampler", "name", "timestep_cond", "steps", "scale", "guessed"),
    [
        ("euler_a", "sd-turbo", False, 1, 0.0, False),
        ("lcm", "sd15-lcm-lora", False, 4, 1.0, False),
        ("lcm", "LCM_Dreamshaper_v7", True, 4, 8.0, False),
        ("euler", "SDXL-Lightning", False, 4, 0.0, False),
        ("euler", "sdxl_lightning_8step", False, 8, 0.0, False),
        ("pndm", "stable-diffusion-v1-5", False, 20, 7.5, True),
    ],
)
def test_defaults_are_those_of_the_family(sampler, name, timestep_cond, steps, scale, guessed):
    expected = {"sampler": sampler, "steps": steps, "guidance_scale": scale}
    assert family_defaults(sampler, name, timestep_cond) == (expected, guessed)


def test_defaults_are_parsed():
    text = "steps=1, guidance_scale=0,sampler=euler_a"
    assert parse_defaults(text) == {"steps": 1, "guidance_scale": 0.0, "sampler": "euler_a"}


@pytest.mark.parametrize("text", ["steps=many", "steps=0", "steps", "width=5", "sampler=plms",
                                  "guidance_scale=nan"])  # fmt: skip
def test_a_default_that_is_not_allowed_is_named(text):
    with pytest.raises(CheckpointError, match=text.split("=")[0]):
        parse_defaults(text)


def test_defaults_that_are_no_object_are_refused():
    with pytest.raises(CheckpointError, match=r"defaults=\[1\]"):
        check_defaults([1])
