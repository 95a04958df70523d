"""Checkpoint families: pictures equal those of diffusers' own pipelines, from the same noise."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import diffusers.schedulers.scheduling_euler_ancestral_discrete as euler_ancestral
import diffusers.schedulers.scheduling_lcm as lcm
import numpy as np
import pytest
import torch
from harness import contents, open_engine, skeleton

from checkpoints import text_model
from export.checkpoint import open_checkpoint
from export.painting import paint
from export.repository import build
from families import FAMILIES, Family, write_family
from twinbrush.engine.fields import InvalidArgument

PROMPT = "a large red circle left of a star"


def draws():
    """The noise of an image of seed 0, in the order in which the engine draws it."""
    rng = np.random.default_rng(0)
    return lambda *_, **__: torch.from_numpy(rng.standard_normal((1, 4, 16, 16), np.float32))


def paint_with_diffusers(source: Path, family: Family, monkeypatch, **options) -> np.ndarray:
    """The pixels, (H, W, 3) from 0 to 255, of the checkpoint's own pipeline."""
    pipeline = getattr(diffusers, family.pipeline).from_pretrained(source, **options_of(family))
    pipeline.set_progress_bar_config(disable=True)
    draw = draws()
    for module in (lcm, euler_ancestral):
        monkeypatch.setattr(module, "randn_tensor", draw)
    latents = draw()
    return 255 * pipeline(
        PROMPT, num_inference_steps=family.steps, guidance_scale=family.guidance_scale,
        latents=latents, output_type="np", **options,
    ).images[0]  # fmt: skip


def options_of(family: Family) -> dict:
    return {} if family.xl else {"safety_checker": None, "feature_extractor": None}


def paint_served(repository: Path, family: Family, **fields: np.ndarray) -> np.ndarray:
    engine = open_engine(repository)
    try:
        (picture,) = paint(
            engine, [PROMPT], steps=np.array([family.steps]),
            guidance_scale=np.array([family.guidance_scale]), **fields,
        )  # fmt: skip
    finally:
        engine.close()
    return picture


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Writes and exports a family, once: its checkpoint and its repository."""
    made: dict[str, tuple[Path, Path]] = {}
    folder = tmp_path_factory.mktemp("families")

    def export(name: str) -> tuple[Path, Path]:
        if name not in made:
            source = write_family(folder / name.replace("/", "--"), FAMILIES[name])
            repository = skeleton(folder / f"{source.name}-served")
            build(open_checkpoint(source), repository)
            made[name] = source, repository
        return made[name]

    return export


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_are_those_of_diffusers_own_pipeline(name, exported, monkeypatch):
    family = FAMILIES[name]
    source, repository = exported(name)
    ours = paint_served(repository, family)
    theirs = paint_with_diffusers(source, family, monkeypatch)
    assert theirs.std() > 2
    assert np.abs(ours - theirs).max() <= 2


XL = "stabilityai/stable-diffusion-xl-base-1.0"


def test_sizes_of_sdxl_are_those_of_diffusers(exported, monkeypatch):
    source, repository = exported(XL)
    ours = paint_served(
        repository, FAMILIES[XL], original_size=np.array([40, 700]),
        crop_top_left=np.array([3, 500]), target_size=np.array([128, 64]),
    )  # fmt: skip
    theirs = paint_with_diffusers(
        source, FAMILIES[XL], monkeypatch, original_size=(40, 700),
        crops_coords_top_left=(3, 500), target_size=(128, 64),
    )  # fmt: skip
    assert np.abs(ours - theirs).max() <= 2
    assert np.abs(paint_served(repository, FAMILIES[XL]) - ours).max() > 2


def test_checkpoints_without_sizes_refuse_them_by_name(exported):
    _, repository = exported("runwayml/stable-diffusion-v1-5")
    with pytest.raises(InvalidArgument, match=r"target_size=\[64, 64\] is invalid: is no input"):
        paint_served(repository, FAMILIES[XL], target_size=np.array([64, 64]))


def test_a_text_model_beside_sdxl_changes_nothing_until_it_is_trained(exported, tmp_path):
    source, repository = exported(XL)
    served = skeleton(tmp_path / "served")
    build(open_checkpoint(source, text_model(tmp_path / "bert", "bert")), served)
    plain, beside = (paint_served(place, FAMILIES[XL]) for place in (repository, served))
    assert (served / "bert" / "1" / "model.onnx").exists()
    assert np.abs(plain.astype(int) - beside).max() <= 1


def test_models_that_a_checkpoint_lacks_leave_the_repository(exported, tmp_path):
    source, _ = exported(XL)
    plain, _ = exported("runwayml/stable-diffusion-v1-5")
    served = skeleton(tmp_path / "served")
    build(open_checkpoint(source), served)
    assert (served / "clip_text_2" / "1" / "model.onnx").exists()
    assert not (served / "bert").exists()
    build(open_checkpoint(plain, text_model(tmp_path / "bert", "bert")), served)
    assert not (served / "clip_text_2").exists()
    assert 'name: "bert"' in (served / "bert" / "config.pbtxt").read_text()
    models = json.loads((served / "MANIFEST.json").read_text())["models"]
    assert [m["model"] for m in models] == ["clip_text", "bert", "fusion", "unet", "vqgan_decoder"]
    assert not [name for name in contents(served) if "clip_tokenizer_2" in name]
