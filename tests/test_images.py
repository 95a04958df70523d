"""Pixels and their encodings."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

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
