"""Every rule about what a client may ask for, without a server."""

from dataclasses import replace

import numpy as np
import pytest

from twinbrush.engine.config import Defaults, PipelineConfig
from twinbrush.engine.fields import InvalidArgument, shown
from twinbrush.engine.request import FIELDS, GenerationRequest
from twinbrush.engine.samplers import NoiseSchedule

CONFIG = PipelineConfig(
    checkpoint="test",
    schedule=NoiseSchedule(alphas_cumprod=tuple(np.linspace(0.999, 0.005, 1000).tolist())),
    defaults=Defaults(steps=8, guidance_scale=3.0, sampler="dpmpp_2m"),
    native_width=64, native_height=64, side_multiple=16, scale_factor=8, latent_channels=4,
    encoders=(), fusion_inputs=(), unet_inputs=(), timestep_cond=None, latent_to_rgb=(),
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
    assert replace(CONFIG, native_width=native, native_height=native).max_side == most


def test_silence_takes_the_checkpoints_defaults():
    request = parse()
    assert (request.steps, request.guidance_scale, request.sampler) == (8, 3.0, "dpmpp_2m")
    assert (request.width, request.height, request.num_images) == (64, 64, 1)
    assert request.image_format == "png_base64"  # valid in JSON


def test_a_guidance_scale_of_zero_is_not_silence():
    assert parse(guidance_scale=0.0).guidance_scale == 0.0


def test_an_absent_seed_is_random():
    assert parse().seed != parse().seed


BAD = [
    ({"prompt": None}, "prompt", "must be given"),
    ({"prompt": b""}, "prompt", "not empty"),
    ({"prompt": b"  \n"}, "prompt", "not empty"),
    ({"prompt": b"x" * 2001}, "prompt", "at most 2000 characters"),
    ({"prompt": b"a \xff circle"}, "prompt", "UTF-8"),
    ({"prompt": b"a\0b"}, "prompt", "NUL"),
    ({"negative_prompt": b"\xc3("}, "negative_prompt", "UTF-8"),
    ({"steps": 0}, "steps=0", "must be between 1 and 50"),
    ({"steps": -3}, "steps=-3", "must be between 1 and 50"),
    ({"steps": 10_000}, "steps=10000", "must be between 1 and 50"),
    ({"width": 0}, "width=0", "multiple of 16"),
    ({"height": 65}, "height=65", "multiple of 16"),
    ({"width": -64}, "width=-64", "multiple of 16"),
    ({"width": 100_000}, "width=100000", "between 16 and 256 pixels"),
    ({"seed": -1}, "seed=-1", "between 0 and 9223372036854775807"),
    ({"seed": 2**63 - 1, "num_images": 2}, "seed=", "between 0 and 9223372036854775806"),
    ({"guidance_scale": float("nan")}, "guidance_scale=nan", "finite"),
    ({"guidance_scale": float("inf")}, "guidance_scale=inf", "finite"),
    ({"guidance_scale": -1.0}, "guidance_scale=-1.0", "between 0 and 50"),
    ({"sampler": b"dpm_fast"}, "sampler='dpm_fast'", "lcm, ddim, euler, dpmpp_2m"),
    ({"image_format": b"gif"}, "image_format='gif'", "png, jpeg, .*raw, png_base64"),
    ({"num_images": 0}, "num_images=0", "between 1 and 16"),
    ({"num_images": 1000}, "num_images=1000", "between 1 and 16"),
    ({"priority": b"urgent"}, "priority='urgent'", "one of low, normal, high"),
    ({"deadline_ms": -1}, "deadline_ms=-1", "between 0 and 86400000"),
    ({"eta": 1.5}, "eta=1.5", "finite number between 0 and 1"),
    ({"guidance_rescale": -0.5}, "guidance_rescale=-0.5", "between 0 and 1"),
    ({"guidance_start": 0.5, "guidance_end": 0.25}, "guidance_start=0.5", "guidance_end, .* 0.25"),
    ({"sigma_schedule": b"cosine"}, "sigma_schedule='cosine'", "one of default, normal, karras"),
    ({"preview_every": -1}, "preview_every=-1", "between 0 and 50"),
    ({"steps": np.array([1, 2], np.int32)}, "steps=", r"must have the shape \[1\]"),
    ({"steps": np.array([4.0], np.float32)}, "steps=4.0", "integer"),
    ({"scale": 3}, "scale=3", "is no input; the inputs are prompt, "),
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


@pytest.mark.parametrize("name", ["prompt", "negative_prompt", "sampler", "image_format"])
def test_a_huge_text_is_refused_without_being_decoded(name):
    class Huge(bytes):
        """A text that must not be read."""

        def decode(self, *arguments):
            raise AssertionError("it was decoded")

    tensor = np.array([None], object)
    tensor[0] = Huge(b"x" * 100_000)
    with pytest.raises(InvalidArgument, match=r"at most .*; it has 100000 bytes\.$") as error:
        parse(**{name: tensor})
    assert str(error.value).startswith(f"{name}='xxx")


def test_a_text_of_the_longest_characters_fits():
    assert len(parse(prompt="𝕏".encode() * 2000).prompt) == 2000


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"\xff" * 10**6, repr("\ufffd" * 60) + "..."),
        ("é" * 61, repr("é" * 60) + "..."),
        ([1, 2], "[1, 2]"),
        ([1] * 10**6, "<list>"),
        (object(), "<object>"),
        (None, "None"),
    ],
)
def test_values_are_shown_at_bounded_length(value, text):
    assert shown(value) == text


def test_a_number_is_not_a_flag_nor_a_flag_a_number():
    with pytest.raises(InvalidArgument, match=r"^steps=True is invalid: must be an integer"):
        parse(steps=True)
    with pytest.raises(InvalidArgument, match=r"^deterministic=1 is invalid: must be true or"):
        parse(deterministic=1)


def test_every_field_says_what_it_is_for():
    assert [name for name, field in FIELDS.items() if not field.help.endswith(".")] == []


def test_metadata_repeats_a_picture_and_leaves_out_its_delivery():
    request = parse(prompt=b"a ring", seed=5, num_images=3, priority=b"low", preview_every=2)
    config = replace(CONFIG, checkpoint_hash="0123456789abcdef")
    metadata = request.metadata_of(2, config)
    assert metadata["seed"] == 7
    assert (metadata["checkpoint"], metadata["checkpoint_hash"]) == ("test", "0123456789")
    fields = {name: value for name, value in metadata.items() if name in FIELDS}
    assert not fields.keys() & {"num_images", "image_format", "priority", "preview_every"}
    tensors = {n: np.array([v.encode() if isinstance(v, str) else v]) for n, v in fields.items()}
    again = GenerationRequest.parse({n: t.astype(object) for n, t in tensors.items()}, CONFIG)
    assert again == replace(request, seed=7, num_images=1, priority="normal", preview_every=0)


def test_metadata_can_be_left_out():
    assert parse(metadata=False).metadata_of(0, CONFIG) == {}
