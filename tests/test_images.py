"""Pixels and their encodings."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import ExifTags, Image

from twinbrush.engine import images

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def test_the_ends_of_the_range_are_black_and_white():
    picture = np.stack([np.full((2, 2), value, np.float32) for value in (-1.5, 0.0, 1.0)])
    assert images.to_pixels(picture)[0, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_no_picture(value):
    picture = np.zeros((3, 2, 2), np.float32)
    picture[1, 0, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        images.to_pixels(picture)


@pytest.mark.parametrize("image_format", ["png", "png_base64", "raw"])
def test_lossless_formats_keep_every_pixel(image_format):
    data = images.encode(PIXELS, image_format)
    if image_format == "raw":
        got = np.frombuffer(data, np.uint8).reshape(PIXELS.shape)
    else:
        file = base64.b64decode(data) if image_format == "png_base64" else data
        got = np.asarray(Image.open(io.BytesIO(file)))
    np.testing.assert_array_equal(got, PIXELS)


def test_jpeg_is_a_jpeg_of_the_same_size():
    image = Image.open(io.BytesIO(images.encode(PIXELS, "jpeg")))
    assert (image.format, image.size) == ("JPEG", (40, 24))


def test_a_preview_is_a_linear_map_of_the_cells_around():
    latent = np.zeros((2, 2, 3), np.float32)
    latent[0, 0, 1], latent[1, 1, 2] = 2.0, 1.0
    to_rgb = np.zeros((2 * 9 + 1, 3), np.float32)
    to_rgb[-1] = (-1, -1, -1)
    to_rgb[4] = (1, 0, 0)  # the cell itself, channel 0
    to_rgb[9 + 4] = (0, 1, 0)  # the cell itself, channel 1
    to_rgb[9 + 5] = (0, 0, 1)  # its right neighbour, channel 1
    preview = images.preview(latent, to_rgb)
    assert preview.tolist() == [
        [[0, 0, 0], [255, 0, 0], [0, 0, 0]],
        [[0, 0, 0], [0, 0, 128], [0, 128, 128]],  # the edge repeats outwards
    ]


STORY = {
    "prompt": "a ring, élan 𝕏", "negative_prompt": "blur", "seed": 2**63 - 1, "steps": 4,
    "sampler": "ddim", "guidance_scale": 2.5, "width": 40, "height": 24, "checkpoint": "a: b",
    "checkpoint_hash": "0123abcd", "version": "Twinbrush 1",
}  # fmt: skip
TEXT = (
    "a ring, élan 𝕏\nNegative prompt: blur\nSteps: 4, Sampler: ddim, CFG scale: 2.5, "
    'Seed: 9223372036854775807, Size: 40x24, Model hash: 0123abcd, Model: "a: b", '
    "Version: Twinbrush 1"
)


def opened(image_format, metadata):
    return Image.open(io.BytesIO(images.encode(PIXELS, image_format, metadata)))


def test_a_png_carries_its_story():
    image = opened("png", STORY)
    assert image.text["parameters"] == TEXT
    assert json.loads(image.text["twinbrush"]) == STORY
    np.testing.assert_array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize("image_format", ["jpeg", "webp", "avif"])
def test_other_files_carry_it_in_exif(image_format):
    image = opened(image_format, STORY)
    assert (image.format, image.size) == (image_format.upper(), (40, 24))
    exif = image.getexif().get_ifd(ExifTags.IFD.Exif)
    comment = exif[ExifTags.Base.UserComment]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == TEXT
    assert json.loads(exif[ExifTags.Base.MakerNote]) == STORY


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp", "avif"])
def test_the_longest_prompts_fit_and_none_leaves_nothing(image_format):
    longest = STORY | {"prompt": "𝕏" * 2000, "negative_prompt": '"' * 2000}
    image = opened(image_format, longest)
    exif = image.getexif().get_ifd(ExifTags.IFD.Exif)
    carried = image.text["twinbrush"] if image_format == "png" else exif[ExifTags.Base.MakerNote]
    assert json.loads(carried) == longest
    bare = images.encode(PIXELS, image_format, {})
    assert b"ring" not in images.encode(PIXELS, image_format, None) == bare
    assert not Image.open(io.BytesIO(bare)).getexif()


def test_a_setting_of_nought_is_written():
    text = images.parameters_text({"guidance_scale": 0.0, "seed": 0, "checkpoint_hash": ""})
    assert text == "\nCFG scale: 0, Seed: 0"


def test_text_that_would_break_a_list_of_settings_is_quoted():
    assert 'Model: "a, b: c\\n"' in images.parameters_text({"checkpoint": "a, b: c\n"})


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp", "avif", "raw"])
def test_base64_holds_the_same_file(image_format):
    in_text = images.encode(PIXELS, f"{image_format}_base64", STORY)
    assert base64.b64decode(in_text, validate=True) == images.encode(PIXELS, image_format, STORY)
