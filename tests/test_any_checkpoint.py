"""Checkpoints of others: Stable Diffusion and LCM with any text model beside CLIP."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers.schedulers.scheduling_lcm as lcm_module
import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline
from harness import contents, export_command, open_engine, skeleton

from checkpoints import TEXT_MODELS, stable_diffusion, text_model
from examples.scenes.quality import paint
from export.checkpoint import open_checkpoint
from export.convert import parity_error, to_onnx
from export.pipeline import defaults
from export.prune import prune_checkpoint
from export.repository import MODELS, RepositoryError, build, load_parts
from networks.loading import CheckpointError

PROMPT, STEPS = "a red circle", 4


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return text_model(tmp_path_factory.mktemp("bert") / "tiny-bert", "bert")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, bert) -> tuple[Path, Path]:
    """A checkpoint without BERT and fusion head, and its repository."""
    folder = tmp_path_factory.mktemp("foreign")
    source = stable_diffusion(folder / "stable-diffusion", distilled=False)
    repository = skeleton(folder / "model_repository")
    build(open_checkpoint(source, bert), repository)
    return source, repository


@pytest.fixture(scope="module")
def distilled(foreign, tmp_path_factory, bert) -> tuple[Path, Path]:
    """The same with a distilled UNet."""
    folder = tmp_path_factory.mktemp("distilled")
    source = stable_diffusion(folder / "lcm", distilled=True)
    repository = shutil.copytree(foreign[1], folder / "model_repository")
    build(open_checkpoint(source, bert), repository, only=["unet"])
    return source, repository


def draws():
    """The noise of an image of seed 0, in the order in which the engine draws it."""
    rng = np.random.default_rng(0)
    return lambda *_, **__: torch.from_numpy(rng.standard_normal((1, 4, 8, 8), np.float32))


def test_a_consistency_lora_in_a_plain_unet_gets_its_own_defaults(foreign, bert, tmp_path):
    source = Path(shutil.copytree(foreign[0], tmp_path / "fused"))
    index = json.loads((source / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "LCMScheduler"]
    (source / "model_index.json").write_text(json.dumps(index))
    wanted = {"sampler": "lcm", "steps": 4, "guidance_scale": 1.0}
    assert defaults(open_checkpoint(source, bert)) == wanted


@pytest.mark.parametrize(
    ("kind", "pipeline_class"),
    [("foreign", StableDiffusionPipeline), ("distilled", LatentConsistencyModelPipeline)],
)
def test_pictures_are_those_of_diffusers_own_pipeline(kind, pipeline_class, request, monkeypatch):
    source, repository = request.getfixturevalue(kind)
    pipeline = pipeline_class.from_pretrained(source, safety_checker=None, feature_extractor=None)
    pipeline.set_progress_bar_config(disable=True)
    draw = draws()
    monkeypatch.setattr(lcm_module, "randn_tensor", draw)
    theirs = pipeline(
        PROMPT, num_inference_steps=STEPS, guidance_scale=5.0, latents=draw(), output_type="np"
    ).images[0]
    engine = open_engine(repository)
    (ours,) = paint(engine, [PROMPT], steps=np.array([STEPS]), guidance_scale=np.array([5.0]))
    engine.close()
    assert ours.std() > 5
    assert np.abs(ours - theirs * 255).max() <= 2


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_any_text_model_stands_beside_clip(kind, foreign, tmp_path):
    source, _ = foreign
    parts = load_parts(open_checkpoint(source, text_model(tmp_path / kind, kind)))
    part = parts["bert"]
    to_onnx(part, tmp_path / "model.onnx")
    assert parity_error(part, tmp_path / "model.onnx") <= part.tolerance
    levels, length, width = part.output[1].axes
    assert (levels, length, width) == (len(part.module.layers), 16, 32)
    assert "decoder" not in dict(part.module.encoder.named_children())


def test_one_part_can_be_rebuilt(foreign, bert):
    source, repository = foreign
    before = contents(repository)
    manifest = (repository / "MANIFEST.json").read_text()
    reports = build(open_checkpoint(source, bert), repository, only=["fusion"])
    assert [report.model for report in reports] == ["fusion"]
    after = contents(repository)
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {
        "MANIFEST.json", "fusion/1/model.onnx", "text_to_image_stream/1/pipeline.json"
    }  # fmt: skip
    models = json.loads((repository / "MANIFEST.json").read_text())["models"]
    assert [model["model"] for model in models] == list(MODELS)
    kept = [model for model in models if model["model"] != "fusion"]
    assert kept == [m for m in json.loads(manifest)["models"] if m["model"] != "fusion"]


def test_a_part_that_would_not_fit_the_others_is_not_rebuilt(foreign, tiny, bert, tmp_path):
    source, repository = foreign
    with pytest.raises(CheckpointError, match=r"has no export of .* to keep: export everything"):
        build(open_checkpoint(source, bert), skeleton(tmp_path / "empty"), only=["unet"])
    before = contents(repository)
    other = text_model(tmp_path / "distilbert", "distilbert")
    with pytest.raises(CheckpointError, match=r"the bert in .* has other tensors"):
        build(open_checkpoint(source, other), repository, only=["unet"])
    assert contents(repository) == before


@pytest.mark.parametrize(
    ("model", "tokenizer"), [("clip_text", "tokenizer"), ("bert", "bert_tokenizer")]
)
def test_a_text_model_that_stays_keeps_its_tokenizer(tiny, repository, tmp_path, model, tokenizer):
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    file = other / tokenizer / "tokenizer.json"
    vocabulary = json.loads(file.read_text())
    ids = vocabulary["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    file.write_text(json.dumps(vocabulary))
    before = contents(repository)
    with pytest.raises(
        CheckpointError, match=rf"the {model} in .* has another \w+_tokenizer\.json"
    ):
        build(open_checkpoint(other), repository, only=["unet"])
    assert contents(repository) == before


def test_the_manifest_says_where_each_model_is_from(distilled_repository):
    manifest = json.loads((distilled_repository / "MANIFEST.json").read_text())
    sources = {line["model"]: line["checkpoint"] for line in manifest["models"]}
    assert sources == dict.fromkeys(MODELS, "tiny") | {"unet": "lcm"}
    assert all("diffusers" in line["tools"] for line in manifest["models"])


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"models": [{}]}'])
def test_a_manifest_that_cannot_be_read_keeps_nothing(tiny, repository, tmp_path, text):
    copy = Path(shutil.copytree(repository, tmp_path / "copy"))
    (copy / "MANIFEST.json").write_text(text)
    with pytest.raises(RepositoryError, match=r"MANIFEST\.json cannot be read.*export everything"):
        build(open_checkpoint(tiny), copy, only=["unet"])


def test_a_pruned_text_model_is_kept_and_gated_against_the_one_of_bert(foreign, bert, tmp_path):
    source, repository = foreign
    pruned = tmp_path / "pruned"
    prune_checkpoint(open_checkpoint(source, bert), {"bert": 0.2}, pruned)
    served = shutil.copytree(repository, tmp_path / "model_repository")
    done = export_command(
        pruned, "--repository", served, "--only", "bert", "--bert", bert,
        "--gate", "--gate-against", source, "--gate-prompts", "1",
    )  # fmt: skip
    assert done.exit_code == 0, done.stdout
    lines = json.loads((served / "MANIFEST.json").read_text())["models"]
    assert [line["model"] for line in lines if line["pruning"]] == ["bert"]


def test_a_fusion_head_without_its_bert_says_what_to_do(tiny, tmp_path):
    source = Path(shutil.copytree(tiny, tmp_path / "source"))
    index = json.loads((source / "model_index.json").read_text())
    del index["bert"], index["bert_tokenizer"]
    (source / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks its part bert/; --bert names"):
        open_checkpoint(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"addition_embed_type": "text_time"}, "unet has addition_embed_type text_time"),
        ({"in_channels": 9}, "unet has in_channels 9 and out_channels 4"),
    ],
)
def test_a_unet_that_wants_more_than_a_prompt_is_refused(
    foreign, bert, change, message, monkeypatch
):
    opened = open_checkpoint(foreign[0], bert)
    unet = load_parts(opened)["unet"].module.unet
    unet.register_to_config(**change)
    monkeypatch.setattr(type(opened), "load", lambda self, part, model_class, **options: unet)
    from export import unet as unet_module

    with pytest.raises(CheckpointError, match=message):
        unet_module.part(opened, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoints/scenes-64", "--only", "unet,vae"], "--only 'vae' is no model: clip_text"),
        (["checkpoints/scenes-64", "--report", "/no/such/place.json"], "/no/such is no folder"),
        (["checkpoints/scenes-64", "--bert", "/no/such"], "--bert /no/such is not there"),
        (
            ["checkpoints/scenes-64", "--precision", "int8"],
            "--precision 'int8' is not",
        ),
    ],
)
def test_the_command_says_in_a_sentence_what_is_wrong(arguments, message, tmp_path):
    done = export_command(*arguments, "--repository", skeleton(tmp_path / "model_repository"))
    assert done.exit_code == 1
    assert message in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1


def test_a_hub_that_does_not_answer_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    done = export_command("nobody/nothing", "--repository", skeleton(tmp_path / "model_repository"))
    assert done.exit_code == 1
    assert "nobody/nothing is not a folder, and the hub did not give it:" in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1
    assert "Traceback" not in done.output


def test_the_command_reports_what_it_built(foreign, bert, tmp_path):
    source, repository = foreign
    done = export_command(
        source, "--bert", bert, "--repository", repository, "--only", "fusion",
        "--report", tmp_path / "report.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (line,) = json.loads((tmp_path / "report.json").read_text())
    assert (line["model"], line["precision"]) == ("fusion", "fp32")
    assert line["error"] < 1e-5
