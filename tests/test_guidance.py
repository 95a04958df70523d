"""Guidance against diffusers, and its interval."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from twinbrush.engine.guidance import Guidance, guidance_embedding, needs_negative, rescale


@pytest.mark.parametrize("scale", [1.0, 3.5, 8.0])
def test_guidance_embedding_is_that_of_diffusers(scale):
    pipeline = diffusers.LatentConsistencyModelPipeline
    w = torch.tensor([scale - 1.0])
    theirs = pipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)
    np.testing.assert_allclose(guidance_embedding(scale, 256), theirs[0].numpy(), atol=1e-3)


def test_rescaled_guidance_is_that_of_diffusers():
    rng = np.random.default_rng(0)
    guided, conditional = rng.standard_normal((2, 3, 4, 8, 8), np.float32) * [[[[[3]]]], [[[[1]]]]]
    strength = np.array([0.0, 0.7, 1.0])
    ours = rescale(guided, conditional, strength)
    for i, phi in enumerate(strength):
        tensors = (torch.from_numpy(array[i : i + 1]) for array in (guided, conditional))
        theirs = rescale_noise_cfg(*tensors, guidance_rescale=phi)
        np.testing.assert_allclose(ours[i], theirs[0].numpy(), atol=1e-5)


def test_guidance_applies_inside_its_interval():
    shares = [i / 4 for i in range(4)]
    assert [Guidance(3.0).applies(share) for share in shares] == [True] * 4
    part = Guidance(3.0, start=0.25, end=0.75)
    assert [part.applies(share) for share in shares] == [False, True, True, False]


@pytest.mark.parametrize(("scale", "needed"), [(0.0, False), (1.0, False), (1.01, True)])
def test_a_scale_of_at_most_one_needs_no_negative_row(scale, needed):
    assert needs_negative(scale) is needed
