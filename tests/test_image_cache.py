"""Finished files are found again by what their bytes depend on, in bounded memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_engine
from harness import open_engine

from twinbrush.engine.image_cache import DELIVERY, ImageCache
from twinbrush.engine.limits import Limits
from twinbrush.engine.request import FIELDS, NOT_IN_METADATA, GenerationRequest


def request(**fields) -> GenerationRequest:
    given = {name: field.default for name, field in FIELDS.items() if name != "prompt"}
    given |= {
        "seed": 5, "steps": 4, "guidance_scale": 2.0, "width": 64, "height": 64, "sampler": "ddim",
        "eta": None, "original_size": None, "crop_top_left": None, "target_size": None,
        "image_quality": None, "deterministic": True,
    }  # fmt: skip
    return GenerationRequest(prompt="a red ring", **given | fields)


def test_all_images_of_a_request_are_found_by_seed_or_none():
    cache = ImageCache(100)
    cache.add(request(seed=5, num_images=2), 0, b"five")
    assert cache.get(request(seed=5, num_images=2)) == []
    cache.add(request(seed=5, num_images=2), 1, b"six")
    assert cache.get(request(seed=5, num_images=2)) == [b"five", b"six"]
    assert cache.get(request(seed=6)) == [b"six"]


@pytest.mark.parametrize(
    "change",
    [{"prompt": "a blue ring"}, {"steps": 5}, {"image_format": "jpeg"}, {"metadata": False}],
)  # fmt: skip
def test_another_request_is_not_found(change):
    cache = ImageCache(100)
    cache.add(request(), 0, b"file")
    assert cache.get(replace(request(), **change)) == []


def test_how_an_image_is_delivered_makes_no_difference():
    assert set(DELIVERY) < NOT_IN_METADATA
    cache = ImageCache(100)
    delivered = {"priority": "high", "deadline_ms": 9, "client": "a", "preview_every": 1}
    cache.add(request(progress=True, **delivered), 0, b"file")
    assert cache.get(request()) == [b"file"]


def test_the_files_asked_for_longest_ago_make_room():
    cache = ImageCache(10)
    for seed in (1, 2):
        cache.add(request(seed=seed), 0, b"12345")
    assert cache.get(request(seed=1))
    cache.add(request(seed=3), 0, b"123")
    assert [bool(cache.get(request(seed=seed))) for seed in (1, 2, 3)] == [True, False, True]
    cache.add(request(seed=4), 0, b"too large for it")
    assert cache.get(request(seed=1))


def test_only_deterministic_requests_are_kept_and_none_without_room():
    cache = ImageCache(10)
    cache.add(request(deterministic=False), 0, b"file")
    assert cache.get(request(deterministic=False)) == []
    nothing = ImageCache(0)
    nothing.add(request(), 0, b"")
    assert nothing.get(request()) == []


def test_a_deterministic_request_that_comes_again_calls_no_network(repository):
    watched = test_engine.Watched(repository)
    engine = open_engine(repository, watched, limits=Limits(image_cache_mb=1))
    try:
        wanted = test_engine.request(engine, steps=2, num_images=2, deterministic=True)
        images = test_engine.Client(engine, wanted).images
        assert len(watched.calls) == 4
        again = test_engine.Client(engine, replace(wanted, priority="high"))
        assert again.images == images
        assert again.error is None
        assert len(watched.calls) == 4
        other = replace(wanted, deterministic=False)
        assert len(test_engine.Client(engine, other).images) == 2
        assert len(watched.calls) > 4
        assert engine._admission.outstanding == 0
    finally:
        engine.close()
