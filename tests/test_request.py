"""Every rule about what a client may ask for, without a server."""

from dataclasses import replace

import numpy as np
import pytest

from twinbrush.engine.config import Defaults, PipelineConfig
from twinbrush.engine.request import GenerationRequest, InvalidArgument
from twinbrush.engine.samplers import NoiseSchedule

CONFIG = PipelineConfig(
    checkpoint="test",
    schedule=NoiseSchedule(alphas_cumprod=(0.9, 0.5, 0.1)),
    defaults=Defaults(steps=8, guidance_scale=3.0, sampler="dpmpp_2m"),
    native_side=64, side_multiple=16, scale_factor=8, latent_channels=4, encoders=(),
    fusion_inputs=(), unet_inputs=(), timestep_cond=None, latent_to_rgb=(),
)  # fmt: skip
TYPES = {int: np.int32, float: np.float32, bool: np.bool_}


def parse(**fields):
    fields = {"prompt": b"a red circle"} | fields
    tensors = {}
    for name, value in fields.items():
        if isinstance(value, np.ndarray) or value is None:
            tensors[name] = value
        elif isinstance(value, bytes):
            tensors[name] = np.array([value], object)
        else:
            dtype = np.int64 if name == "seed" else TYPES[type(value)]
            tensors[name] = np.array([value], dtype)
    return GenerationRequest.parse(tensors, CONFIG)


@pytest.mark.parametrize(("native", "most"), [(64, 256), (512, 2048), (768, 2048), (4096, 4096)])
def test_sides_end_where_networks_do(native, most):
    assert replace(CONFIG, native_side=native).max_side == most


def test_silence_takes_the_checkpoints_defaults():
    request = parse()
    assert (request.steps, request.guidance_scale, request.sampler) == (8, 3.0, "dpmpp_2m")
    assert (request.width, request.height, request.num_images) == (64, 64, 1)
    assert request.image_format == "png"


def test_a_guidance_scale_of_zero_is_not_silence():
    assert parse(guidance_scale=0.0).guidance_scale == 0.0


def test_an_absent_seed_is_random():
    assert parse().seed != parse().seed


BAD = [
    ({"prompt": None}, "prompt", "required"),
    ({"prompt": b""}, "prompt", "not empty"),
    ({"prompt": b"  \n"}, "prompt", "not empty"),
    ({"prompt": b"x" * 2001}, "prompt", "at most 2000 characters"),
    ({"prompt": b"a \xff circle"}, "prompt", "UTF-8"),
    ({"prompt": b"a\0b"}, "prompt", "NUL"),
    ({"negative_prompt": b"\xc3("}, "negative_prompt", "UTF-8"),
    ({"steps": 0}, "steps=0", "1 to 50"),
    ({"steps": -3}, "steps=-3", "1 to 50"),
    ({"steps": 10_000}, "steps=10000", "1 to 50"),
    ({"width": 0}, "width=0", "multiple of 16"),
    ({"height": 65}, "height=65", "multiple of 16"),
    ({"width": -64}, "width=-64", "multiple of 16"),
    ({"width": 100_000}, "width=100000", "16 to 256"),
    ({"seed": -1}, "seed=-1", "0 to 9223372036854775807"),
    ({"seed": 2**63 - 1, "num_images": 2}, "seed=", "0 to 9223372036854775806"),
    ({"guidance_scale": float("nan")}, "guidance_scale=nan", "finite"),
    ({"guidance_scale": float("inf")}, "guidance_scale=inf", "finite"),
    ({"guidance_scale": -1.0}, "guidance_scale=-1.0", "0 to 50"),
    ({"sampler": b"heun"}, "sampler='heun'", "lcm, ddim, euler, dpmpp_2m"),
    ({"image_format": b"gif"}, "image_format='gif'", "png, jpeg, raw, png_base64"),
    ({"num_images": 0}, "num_images=0", "1 to 16"),
    ({"num_images": 1000}, "num_images=1000", "1 to 16"),
    ({"preview_every": -1}, "preview_every=-1", "0 to 50"),
    ({"steps": np.array([1, 2], np.int32)}, "steps=", r"shape must be \[1\]"),
    ({"steps": np.array([4.0], np.float32)}, "steps=4.0", "integer"),
    ({"scale": 3}, "scale=3", "inputs are prompt"),
]


@pytest.mark.parametrize(("fields", "named", "allowed"), BAD, ids=[str(f)[:40] for f, _, _ in BAD])
def test_what_is_not_allowed_is_named_with_what_is(fields, named, allowed):
    with pytest.raises(InvalidArgument, match=allowed) as error:
        parse(**fields)
    assert str(error.value).startswith(named)


def test_a_long_value_does_not_flood_the_message():
    with pytest.raises(InvalidArgument) as error:
        parse(prompt=b"y" * 100_000)
    assert len(str(error.value)) < 200
