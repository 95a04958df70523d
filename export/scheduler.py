"""From a checkpoint's scheduler to the engine's noise schedule, sampler and defaults.

Every option of a scheduler is served, refused by name, or has no effect on the pictures. This
module reads JSON alone: no weight is needed.
"""

from __future__ import annotations

import inspect
import math
from types import NoneType
from typing import Any

import diffusers
from diffusers import SchedulerMixin

from networks.loading import CheckpointError, first_line
from twinbrush.engine.samplers import MAX_STEPS, SAMPLERS, NoiseSchedule, trajectory

# The sampler that a scheduler's class stands for.
SAMPLER_OF = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "pndm",
    "TCDScheduler": "tcd",
    "UniPCMultistepScheduler": "unipc",
}
BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
TRAINED = (*BETAS, "prediction_type", "rescale_betas_zero_snr")
SOLVER = ("solver_type", "solver_order")  # each scheduler has values of its own
# Read by every class that has sigma schedules, also where its constructor does not name them.
SIGMA_BOUNDS = ("sigma_min", "sigma_max")
SIGMA_OPTIONS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
}
# Fields of NoiseSchedule that a scheduler's option of the same name sets.
SAME_NAME = (
    "prediction_type", "timestep_spacing", "steps_offset", "set_alpha_to_one",
    "original_inference_steps", "timestep_scaling", *SIGMA_BOUNDS, "final_sigmas_type",
    "solver_order", "solver_type", "lower_order_final", "euler_at_final", "skip_prk_steps",
    "variance_type",
)  # fmt: skip
# Options served with these values alone, the first of which says what is served. Where clip_sample
# is left out it is off: `check_clipping` refuses a checkpoint whose pipeline would clip.
ONLY = {
    "clip_sample": (False,),
    "thresholding": (False,),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "shift_terminal": (None,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "predict_x0": (True,),
    "disable_corrector": ([],),
    "solver_p": (None, [None, None]),  # saved as the library and class of a part
    "lambda_min_clipped": (None, -math.inf, "-inf", "-Infinity"),
}
ALGORITHMS = {  # and each scheduler's own names of what others call so
    "DPMSolverMultistepScheduler": ("dpmsolver++", "sde-dpmsolver++", "deis"),
    "DEISMultistepScheduler": ("deis", "dpmsolver++", "dpmsolver"),
}
# Options of what ONLY refuses: without it, they have no effect.
WITHOUT_EFFECT = (
    "clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "flow_shift",
    "time_shift_type",
)  # fmt: skip
# What a pipeline of diffusers sets whatever the scheduler's file says.
PIPELINE_OPTIONS = {"StableDiffusionPipeline": {"steps_offset": 1, "clip_sample": False}}
SERVED = {*BETAS, *SAME_NAME, *SIGMA_OPTIONS, *ONLY, *WITHOUT_EFFECT}
SERVED |= {"algorithm_type", "rescale_betas_zero_snr"}

DISTILLED = {"steps": 4, "guidance_scale": 8.0}
FUSED = {"steps": 4, "guidance_scale": 1.0}  # an LCM or TCD UNet without timestep_cond
TURBO = {"steps": 1, "guidance_scale": 0.0}
LIGHTNING = {"steps": 4, "guidance_scale": 0.0}
GUESSED = {"steps": 20, "guidance_scale": 7.5}


def choose_sampler(class_name: str, config: dict[str, Any], replacement: str | None = None) -> str:
    """The sampler that a scheduler stands for, or its replacement.

    Raises:
        CheckpointError: the scheduler is not served and nothing replaces it.
    """
    if replacement is not None:
        if replacement not in SAMPLERS:
            names = ", ".join(SAMPLERS)
            raise CheckpointError(f"sampler={replacement!r} is invalid: must be one of {names}.")
        return replacement
    if class_name not in SAMPLER_OF:
        raise CheckpointError(
            f"the scheduler's class {class_name} is not served: must be one of"
            f" {', '.join(SAMPLER_OF)}. `--sampler NAME` replaces it."
        )
    if config.get("algorithm_type") == "sde-dpmsolver++" and SAMPLER_OF[class_name] == "dpmpp_2m":
        return "dpmpp_2m_sde"
    return SAMPLER_OF[class_name]


def read_schedule(
    class_name: str, config: dict[str, Any], replacement: str | None = None
) -> dict[str, Any]:
    """The fields of NoiseSchedule, as `pipeline.json` holds them.

    Args:
        class_name: the scheduler's class in diffusers.
        config: its `scheduler_config.json`.
        replacement: a sampler in place of the scheduler's. Its scheduler then reads the options
            that it shares, as `from_config` of diffusers does; `unused_options` names the others.

    Raises:
        CheckpointError: the scheduler or one of its options cannot be served.
    """
    sampler = choose_sampler(class_name, config, replacement)
    if replacement is not None:
        config = _shared_options(class_name, config, replacement)
        class_name = _class_of(sampler)
    scheduler_class = getattr(diffusers, class_name)
    known = inspect.signature(scheduler_class).parameters
    _check_options(class_name, config, known)
    merged = {
        name: config.get(name, option.default) for name, option in known.items() if name in SERVED
    }
    if sampler != "lms" or not merged.get("use_karras_sigmas"):  # which reads none in diffusers
        merged |= {name: config[name] for name in SIGMA_BOUNDS if name in config}
    fields = {name: merged[name] for name in SAME_NAME if name in merged}
    if fields.get("variance_type") is None:  # dpmpp's class has None where nothing is learned
        fields.pop("variance_type", None)
    fields |= _shared_fields(config, merged)
    fields["alphas_cumprod"] = _alphas_cumprod(scheduler_class, merged)
    if merged.get("solver_type") not in (None, "midpoint", "heun", "bh1", "bh2", "logrho"):
        raise CheckpointError(_refusal("solver_type", merged["solver_type"], "midpoint or heun"))
    _check_schedule(sampler, fields)
    return fields


def check_clipping(class_name: str, config: dict[str, Any]) -> None:
    """Refuses a scheduler whose class clips where its file is silent, as a pipeline would clip.

    Raises:
        CheckpointError: `config` has no `clip_sample`, which is on by default.
    """
    option = inspect.signature(getattr(diffusers, class_name)).parameters.get("clip_sample")
    if option is not None and option.default and "clip_sample" not in config:
        text = "the scheduler has no clip_sample, which is True by default and is not served"
        raise CheckpointError(f"{text}: must be False.")


def unused_options(class_name: str, config: dict[str, Any], replacement: str) -> dict[str, Any]:
    """Options of a replaced scheduler that have no meaning for the sampler in its place."""
    shared = _shared_options(class_name, config, replacement)
    return {
        name: value
        for name, value in config.items()
        if not name.startswith("_")
        and name not in (*shared, *WITHOUT_EFFECT)
        and value not in ONLY.get(name, ())
    }


def _shared_options(class_name: str, config: dict[str, Any], replacement: str) -> dict[str, Any]:
    """Options of a scheduler that the one of another sampler reads.

    What the UNet was trained with is not left to the defaults of the other class.

    Raises:
        CheckpointError: nothing says which noise the UNet was trained with.
    """
    former_class = getattr(diffusers, class_name, None)
    known_class = isinstance(former_class, type) and issubclass(former_class, SchedulerMixin)
    former = inspect.signature(former_class).parameters if known_class else {}
    config = {name: former[name].default for name in TRAINED if name in former} | config
    if "skip_prk_steps" not in former:
        config = {"skip_prk_steps": True} | config  # see _shared_fields
    if config.get("beta_start") is None and config.get("trained_betas") is None:
        raise CheckpointError(
            f"--sampler {replacement} cannot replace {class_name}: its configuration has no"
            " beta_start, the noise that the UNet was trained with"
        )
    other = _class_of(replacement)
    known = {*inspect.signature(getattr(diffusers, other)).parameters, *SIGMA_BOUNDS}
    named_by_sampler = () if other == class_name else (*SOLVER, "algorithm_type")
    shared = {n: v for n, v in config.items() if n in known and n not in named_by_sampler}
    if replacement in ("dpmpp_2m", "dpmpp_2m_sde"):
        shared.pop("algorithm_type", None)
    return shared


def _shared_fields(config: dict[str, Any], merged: dict[str, Any]) -> dict[str, Any]:
    """Fields with names of their own, and those that only another scheduler's class knows.

    PNDM's Runge-Kutta steps are skipped where its own class does not say otherwise: every
    Stable Diffusion pipeline does so.
    """
    chosen = [name for option, name in SIGMA_OPTIONS.items() if merged.get(option)]
    if len(chosen) > 1:
        raise CheckpointError(f"the scheduler has several sigma schedules: {', '.join(chosen)}.")
    fields = {
        "sigma_schedule": chosen[0] if chosen else "normal",
        "cosine": merged.get("beta_schedule") == "squaredcos_cap_v2",
    }
    if "skip_prk_steps" not in merged:
        fields["skip_prk_steps"] = config.get("skip_prk_steps", True)
    return fields


def _alphas_cumprod(scheduler_class: type, merged: dict[str, Any]) -> list[float]:
    for name in ("beta_start", "beta_end"):
        value = merged.get(name)
        if not isinstance(value, (int, float)) or not 0 < value < 1:
            raise CheckpointError(_refusal(name, value, "a number between 0 and 1"))
    betas = {name: merged.get(name) for name in BETAS}
    trained, timesteps = merged.get("trained_betas"), merged.get("num_train_timesteps")
    if isinstance(trained, list) and len(trained) != timesteps:
        text = f"the scheduler has {len(trained)} trained_betas: must be {timesteps}"
        raise CheckpointError(f"{text}, one for each of its num_train_timesteps.")
    # Only DDIM's class leaves alpha_bar exact where others round a zero up; DDPM's and Heun's
    # know beta schedules that it does not.
    rescaled = bool(merged.get("rescale_betas_zero_snr"))
    reader = diffusers.DDIMScheduler if rescaled else scheduler_class
    options = betas | ({"rescale_betas_zero_snr": True} if rescaled else {})
    try:
        return reader(**options).alphas_cumprod.double().tolist()
    except Exception as error:
        raise CheckpointError(
            f"the scheduler's betas ({', '.join(BETAS)}) cannot be read: {first_line(error)}"
        ) from error


def _check_options(class_name: str, config: dict[str, Any], known: Any) -> None:
    for name, value in config.items():
        if name not in known or (value == known[name].default and name != "clip_sample"):
            continue
        if name not in SERVED:
            raise CheckpointError(_refusal(name, value, "left out"))
        default = known[name].default
        if isinstance(default, bool) and not isinstance(value, bool | NoneType):
            raise CheckpointError(_refusal(name, value, "true or false"))
        if type(default) is int and type(value) is not int:
            raise CheckpointError(_refusal(name, value, "a whole number"))
        if name in ONLY and value is not None and value not in ONLY[name]:
            raise CheckpointError(_refusal(name, value, repr(ONLY[name][0])))
    for name in SIGMA_BOUNDS:
        value = config.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 <= value < math.inf):
            raise CheckpointError(_refusal(name, value, "a number of at least 0"))
    algorithms = ALGORITHMS.get(class_name)
    algorithm = config.get("algorithm_type")
    if algorithms and algorithm is not None and algorithm not in algorithms:
        raise CheckpointError(_refusal("algorithm_type", algorithm, " or ".join(algorithms)))


def _check_schedule(sampler: str, fields: dict[str, Any]) -> None:
    """Builds the schedule and its shortest trajectories, so that requests do not fail later."""
    try:
        tuples = fields | {"alphas_cumprod": tuple(fields["alphas_cumprod"])}
        schedule = NoiseSchedule(**tuples)
        for steps in (4, min(MAX_STEPS, schedule.original_inference_steps)):
            if steps <= schedule.original_inference_steps or sampler not in ("lcm", "tcd"):
                trajectory(sampler, schedule, steps)
    except (ValueError, TypeError, ZeroDivisionError, IndexError) as error:
        raise CheckpointError(f"the scheduler cannot be served: {first_line(error)}") from error


def _class_of(sampler: str) -> str:
    base = "dpmpp_2m" if sampler == "dpmpp_2m_sde" else sampler
    return next(name for name, value in SAMPLER_OF.items() if value == base)


def _refusal(option: str, value: object, allowed: str) -> str:
    return f"the scheduler's {option}={value!r} is not served: must be {allowed}."


def family_defaults(sampler: str, name: str, timestep_cond: bool) -> tuple[dict[str, Any], bool]:
    """Steps, guidance scale and sampler for requests, and whether they are a guess.

    Args:
        sampler: the checkpoint's.
        name: of the checkpoint, where its makers say how it was distilled.
        timestep_cond: whether the UNet takes guidance as an embedding.
    """
    words = name.lower()
    if timestep_cond:
        usual, guessed = DISTILLED, False
    elif sampler in ("lcm", "tcd"):
        usual, guessed = FUSED, False
    elif "turbo" in words:
        usual, guessed = TURBO, False
    elif "lightning" in words:
        usual, guessed = LIGHTNING | _lightning_steps(words), False
    else:
        usual, guessed = GUESSED, True
    return {"sampler": sampler, **usual}, guessed


def _lightning_steps(name: str) -> dict[str, int]:
    """The steps that a Lightning checkpoint names, as in `sdxl_lightning_8step`."""
    for steps in (1, 2, 4, 8):
        if f"{steps}step" in name.replace("_", "").replace("-", ""):
            return {"steps": steps}
    return {}


def parse_defaults(text: str) -> dict[str, Any]:
    """`steps=1,guidance_scale=0,sampler=euler_a` as defaults of requests.

    Raises:
        CheckpointError: a name or a value is not allowed.
    """
    kinds = {"steps": int, "guidance_scale": float, "sampler": str}
    defaults = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (word.strip() for word in item.partition("="))
        if not equals or name not in kinds:
            raise CheckpointError(
                f"--default {item!r} is invalid: must be NAME=VALUE, with NAME one of"
                f" {', '.join(kinds)}."
            )
        try:
            defaults[name] = kinds[name](value)
        except ValueError:
            raise CheckpointError(
                f"--default {item!r} is invalid: {value!r} is no number."
            ) from None
    return check_defaults(defaults)


def check_defaults(defaults: object) -> dict[str, Any]:
    """Defaults of a checkpoint or command line, checked.

    Raises:
        CheckpointError: they are not an object, or a name or value is not allowed.
    """
    if not isinstance(defaults, dict):
        raise CheckpointError(f"defaults={defaults!r} is invalid: must be an object.")
    for name, value in defaults.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        match name:
            case "steps":
                valid = number and value == int(value) and 1 <= value <= MAX_STEPS
                allowed = f"an integer between 1 and {MAX_STEPS}"
            case "guidance_scale":
                valid = number and math.isfinite(value) and value >= 0
                allowed = "a number of at least 0"
            case "sampler":
                valid, allowed = value in tuple(SAMPLERS), f"one of {', '.join(SAMPLERS)}"
            case _:
                valid, allowed = False, "left out: steps, guidance_scale and sampler are allowed"
        if not valid:
            raise CheckpointError(f"default {name}={value!r} is invalid: must be {allowed}.")
    return defaults
