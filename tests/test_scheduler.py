"""Scheduler configs: every option is served, refused by name, or without effect."""

import inspect

import diffusers
import pytest

from export.scheduler import (
    SAMPLER_OF,
    SERVED,
    check_defaults,
    choose_sampler,
    family_defaults,
    parse_defaults,
    read_schedule,
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
