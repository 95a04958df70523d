"""Export: parity, agreement with config.pbtxt, and failures that leave the old repository."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import onnx
import pytest
import torch
from diffusers import VQModel
from harness import ROOT, contents, export_command, skeleton
from safetensors.torch import load_file, save_file

import export.repository as repository_module
from examples.scenes import world
from export import pipeline, scheduler
from export.checkpoint import Checkpoint, open_checkpoint
from export.clip_text import ClipText
from export.convert import ParityError, expected_outputs, parity_error, to_onnx, trace
from export.precision import Precision
from export.repository import MODELS, build, load_parts
from export.staging import STAGE, staging
from export.triton_config import MARKER, with_tensors
from export.vqgan_decoder import AS_PAINTED
from networks.fusion_head import FusionHead
from networks.loading import CheckpointError
from networks.preview import fit_preview
from twinbrush.engine import images
from twinbrush.runtimes.onnx_runtime import open_session, read_config
from twinbrush.server.manifest import verify

ONNX_TYPES = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.UINT8: "TYPE_UINT8",
}


@pytest.fixture
def broken(tiny, tmp_path) -> Path:
    """A copy of the tiny checkpoint to break."""
    return Path(shutil.copytree(tiny, tmp_path / "broken"))


@pytest.mark.parametrize("model", MODELS)
def test_every_model_says_what_pytorch_says(tiny, repository, model):
    part = load_parts(open_checkpoint(tiny))[model]
    assert parity_error(part, repository / model / "1" / "model.onnx") <= part.tolerance


@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_the_decoder_gives_the_bytes_of_its_picture(repository, spread):
    session = open_session(repository / "vqgan_decoder" / "1" / "model.onnx", {})
    latent = np.random.default_rng(0).standard_normal((3, 4, 6, 10), np.float32) * spread
    picture, pixels, magnitude = session.run(None, {"latent": latent})
    np.testing.assert_array_equal(pixels, [images.to_pixels(image) for image in picture])
    np.testing.assert_allclose(magnitude, np.abs(picture).mean(axis=(1, 2, 3)), rtol=1e-5)
    latent[1, 0, 0, 0] = np.inf
    *_, magnitude = session.run(None, {"latent": latent})
    assert np.isfinite(magnitude).tolist() == [True, False, True]


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_a_model_out_of_tolerance_is_refused(tiny, repository, factor):
    part = load_parts(open_checkpoint(tiny))["unet"]
    with torch.no_grad():
        next(part.module.parameters()).mul_(factor)
    with pytest.raises(ParityError, match=r"unet: error .* against PyTorch is over"):
        parity_error(part, repository / "unet" / "1" / "model.onnx")


@pytest.mark.parametrize("kind", ["repository", "distilled_repository"])
@pytest.mark.parametrize("model", MODELS)
def test_every_config_agrees_with_its_onnx_file(kind, model, request):
    folder = request.getfixturevalue(kind) / model
    config = read_config(folder / "config.pbtxt")
    graph = onnx.load(str(folder / "1" / "model.onnx"), load_external_data=False).graph
    for kind, values in (("input", graph.input), ("output", graph.output)):
        in_graph = {
            value.name: (
                ONNX_TYPES[value.type.tensor_type.elem_type],
                [d.dim_value or -1 for d in value.type.tensor_type.shape.dim],
            )
            for value in values
            if value.name != "image"  # which the decoder's pixels are made from
        }
        in_config = {
            tensor["name"]: (tensor["data_type"], [int(d) for d in tensor["dims"]])
            for tensor in config[kind]
        }
        assert in_config == in_graph
    assert config["name"] == model
    assert config["instance_group"][0]["count"] == 1


def test_the_committed_configs_are_those_of_the_demo_checkpoint():
    parts = load_parts(open_checkpoint(ROOT / "checkpoints" / "scenes-64"))
    for name, part in parts.items():
        text = (ROOT / "model_repository" / name / "config.pbtxt").read_text()
        assert with_tensors(text, part) == text, name


def test_the_settings_of_a_config_survive_an_export(tiny):
    part = load_parts(open_checkpoint(tiny))["fusion"]
    mine = 'name: "fusion"\ninstance_group [ { count: 3 } ]\n'
    once = with_tensors(mine, part)
    assert once.startswith(mine + MARKER)
    assert with_tensors(once, part) == once


def test_the_manifest_holds_what_was_written(repository):
    manifest = json.loads((repository / "MANIFEST.json").read_text())
    assert [model["model"] for model in manifest["models"]] == list(MODELS)
    for model in manifest["models"]:
        for name, sha256 in model["sha256"].items():
            data = (repository / model["model"] / "1" / name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == sha256


def test_a_fresh_fusion_head_is_the_identity():
    head = FusionHead(width=32, bert_width=16, bert_layers=(1, 2), heads=2)
    clip, bert = torch.randn(2, 7, 32), torch.randn(2, 2, 5, 16)
    assert torch.equal(head(clip, bert, torch.ones(2, 5)), clip)


def test_padding_never_reaches_the_fused_tokens(tiny):
    head = load_parts(open_checkpoint(tiny))["fusion"].module
    clip, bert = torch.randn(1, 16, 32), torch.randn(1, 2, 16, 32)
    mask = torch.tensor([[1] * 5 + [0] * 11])
    other = bert.clone()
    other[:, :, 5:] = 9.0
    assert torch.equal(head(clip, bert, mask), head(clip, other, mask))


def test_previews_look_like_the_pictures():
    """Previews of scenes-64 explain most of what its pictures look like, cell by cell."""
    opened = open_checkpoint(ROOT / "checkpoints" / "scenes-64")
    vae = opened.load("vae", VQModel)
    to_rgb = np.array(opened.index["latent_to_rgb"], np.float32)
    batch, _ = world.draw_scenes(seed=5, count=32)
    pictures = world.pictures(batch)
    with torch.no_grad():
        latents = vae.encode(pictures).latents.numpy() * vae.config.scaling_factor
    cells = torch.nn.functional.adaptive_avg_pool2d(pictures, (8, 8)).numpy()
    wanted = np.stack([images.to_pixels(cell) for cell in cells]).astype(float)
    rough = np.stack([images.preview(latent, to_rgb) for latent in latents]).astype(float)
    assert np.square(rough - wanted).mean() < 0.5 * wanted.var()


def test_previews_allow_for_noise_where_channels_are_almost_alike():
    generator = torch.Generator().manual_seed(0)
    first, other, speck = torch.randn(3, 64, 1, 8, 8, generator=generator)
    latents = torch.cat([first, first + 1e-4 * other], dim=1)
    wanted = 0.3 * first + 0.2
    pictures = (wanted + 0.05 * speck).expand(-1, 3, -1, -1)
    to_rgb = fit_preview(latents, pictures)
    assert to_rgb == fit_preview(latents, pictures)
    weights, offset = torch.tensor(to_rgb[:-1]).T.reshape(3, 2, 3, 3), torch.tensor(to_rgb[-1])
    off = 0.1 * torch.randn(latents.shape, generator=generator)
    for given, most in ((latents, 0.02), (latents + off, 0.06)):
        around = torch.nn.functional.pad(given, (1, 1, 1, 1), mode="replicate")
        shown = torch.nn.functional.conv2d(around, weights, offset)
        assert (shown - wanted).square().mean().sqrt() < most


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("name", scheduler.SAMPLER_OF)
def test_a_schedule_is_that_of_its_class_where_the_file_is_silent(broken, tmp_path, name):
    (broken / "scheduler" / "scheduler_config.json").write_text("{}")
    change(broken / "model_index.json", scheduler=["diffusers", name])
    opened = open_checkpoint(broken)
    pipeline.write(opened, load_parts(opened), tmp_path)
    schedule = json.loads((tmp_path / "pipeline.json").read_text())["schedule"]
    theirs = getattr(diffusers, name)()
    assert np.allclose(schedule["alphas_cumprod"], theirs.alphas_cumprod)
    assert {k: v for k, v in schedule.items() if k in theirs.config} == {
        k: v for k, v in theirs.config.items() if k in schedule
    }


def test_latents_of_a_codebook_may_be_narrower_than_its_decoder(broken):
    vae = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), norm_num_groups=4, latent_channels=8, vq_embed_dim=4,
    )  # fmt: skip
    vae.save_pretrained(broken / "vae")
    decoder = load_parts(open_checkpoint(broken))["vqgan_decoder"]
    assert decoder.module(**decoder.example(1, 2)).shape[1] == 3


def test_codes_are_looked_up_unless_the_decoder_learnt_from_latents_as_painted(broken, tmp_path):
    opened = open_checkpoint(broken)
    looked_up = load_parts(opened)["vqgan_decoder"]
    change(broken / "vae" / "config.json", **{AS_PAINTED: True})
    as_painted = load_parts(opened)["vqgan_decoder"]
    vae = opened.load("vae", VQModel)
    example = as_painted.example(2, 1)
    latent = example["latent"] / vae.config.scaling_factor
    with torch.no_grad():
        codes = vae.decode(latent).sample
        painted = vae.decode(latent, force_not_quantize=True).sample
        assert not torch.allclose(codes, painted)
        torch.testing.assert_close(looked_up.module(**example), codes)
        torch.testing.assert_close(as_painted.module(**example), painted)
    for part, has_codebook in ((looked_up, True), (as_painted, False)):
        codebook = [name for name, _ in part.module.named_parameters() if "quantize" in name]
        assert bool(codebook) == has_codebook
        for precision in Precision:
            to_onnx(part, tmp_path / "model.onnx", precision)
            error = parity_error(part, tmp_path / "model.onnx", precision)
            assert error <= precision.tolerance(part)


def a_text_model_with_code(folder):
    code = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    change(folder / "bert" / "config.json", model_type="novel", auto_map=code)


def a_tokenizer_with_code(folder):
    code = {"AutoTokenizer": ["code.Slow", "code.Fast"]}
    file = folder / "bert_tokenizer" / "tokenizer_config.json"
    change(file, tokenizer_class="Novel", auto_map=code)


@pytest.mark.parametrize(
    ("bringing", "message"),
    [
        (a_text_model_with_code, "bert has model_type 'novel', which transformers does"),
        (a_tokenizer_with_code, "bert_tokenizer has no tokenizer that can be served: "),
    ],
)
def test_code_that_a_checkpoint_brings_is_not_asked_about(
    broken, tmp_path, monkeypatch, bringing, message
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    bringing(broken)
    done = export_command(broken, "--repository", skeleton(tmp_path / "model_repository"))
    assert done.exit_code == 1
    assert message in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1


def missing_folder(folder):
    shutil.rmtree(folder)


def missing_part(folder):
    shutil.rmtree(folder / "vae")


def no_index(folder):
    (folder / "model_index.json").unlink()


def half_a_part(folder):
    (folder / "unet" / "config.json").unlink()


def only_pickles(folder):
    weights = next((folder / "text_encoder").glob("*.safetensors"))
    weights.rename(weights.with_name("pytorch_model.bin"))


def another_class(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["diffusers", "SD3Transformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))


def another_scheduler(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))


def cut_weights(folder):
    weights = next((folder / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])


def a_tensor_less(folder):
    weights = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(weights)
    del tensors["conv_in.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})


def cut_config(folder):
    config = folder / "fusion" / "config.json"
    config.write_text(config.read_text()[:20])


def config_without_layers(folder):
    (folder / "fusion" / "config.json").write_text("{}")


def no_vocabulary(folder):
    (folder / "tokenizer" / "tokenizer.json").unlink()


def no_schedule(folder):
    (folder / "scheduler" / "scheduler_config.json").unlink()


def lu_lambdas(folder):
    change(folder / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    change(folder / "scheduler" / "scheduler_config.json", use_lu_lambdas=True)


def clipped_samples(folder):
    change(folder / "scheduler" / "scheduler_config.json", clip_sample=True)


def unknown_betas(folder):
    change(folder / "scheduler" / "scheduler_config.json", beta_schedule="zigzag")


def epsilon_from_pure_noise(folder):
    file = folder / "scheduler" / "scheduler_config.json"
    change(file, prediction_type="epsilon", rescale_betas_zero_snr=True)


def an_unknown_default(folder):
    change(folder / "model_index.json", defaults={"colour": "red"})


def a_default_that_no_request_may_have(folder):
    change(folder / "model_index.json", defaults={"guidance_scale": "high"})


def no_model_type(folder):
    change(folder / "bert" / "config.json", model_type=None)


def index_of_another_kind(folder):
    (folder / "model_index.json").write_text("[]")


def mismatched_widths(folder):
    FusionHead(width=64, bert_width=32, bert_layers=(1,), heads=2).save_pretrained(
        folder / "fusion"
    )


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (missing_folder, "is not there"),
        (no_index, "has no model_index.json"),
        (missing_part, "lacks its part vae/"),
        (half_a_part, "unet has no config.json"),
        (only_pickles, "text_encoder has no safetensors"),
        (another_class, "unet is a SD3Transformer2DModel, which cannot be exported"),
        (cut_weights, r"vae/\S+ is cut short at 1000 bytes .* download it again"),
        (a_tensor_less, r"unet lacks 1 of its tensors, conv_in\.weight first"),
        (cut_config, r"fusion/config\.json is not JSON"),
        (config_without_layers, "fusion names no bert_layers"),
        (no_vocabulary, "tokenizer has no vocabulary"),
        (no_schedule, r"scheduler_config\.json is not there"),
        (index_of_another_kind, r"model_index\.json is not a JSON object"),
        (lu_lambdas, "the scheduler's use_lu_lambdas=True is not served: must be False"),
        (clipped_samples, "the scheduler's clip_sample=True is not served: must be False"),
        (unknown_betas, r"the scheduler's betas \(.*beta_schedule.*\) cannot be read: zigzag"),
        (epsilon_from_pure_noise, "prediction_type='epsilon' is invalid where alpha_bar"),
        (an_unknown_default, "default colour='red' is invalid: must be left out"),
        (a_default_that_no_request_may_have, "guidance_scale='high' is invalid"),
        (no_model_type, "bert has model_type None, which transformers does not know"),
        (mismatched_widths, "fusion has width 64, its encoder has 32"),
    ],
)
def test_a_bad_checkpoint_is_named_and_nothing_is_touched(broken, repository, breaking, message):
    breaking(broken)
    before = contents(repository)
    with pytest.raises(CheckpointError, match=message):
        build(open_checkpoint(broken), repository)
    assert contents(repository) == before


def _writes_new(part, file, precision):
    file.write_bytes(b"new")
    return 2, 1


def without_conversion(monkeypatch):
    """Lets a build go through its motions without the minutes of conversion."""
    monkeypatch.setattr(repository_module, "to_onnx", _writes_new)
    monkeypatch.setattr(repository_module, "parity_error", lambda *_: 0.0)


def test_a_scheduler_that_is_not_served_is_named(broken, repository, monkeypatch):
    without_conversion(monkeypatch)
    another_scheduler(broken)
    before = contents(repository)
    with pytest.raises(CheckpointError, match="FlowMatchEulerDiscreteScheduler is not served"):
        build(open_checkpoint(broken), repository)
    assert contents(repository) == before


def test_large_weights_stand_beside_the_graph(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("export.convert.LARGE", 1)
    part = load_parts(open_checkpoint(tiny))["fusion"]
    expected = expected_outputs(part)
    to_onnx(part, tmp_path / "model.onnx")
    weights = sum(p.numel() for p in part.module.parameters())
    assert (tmp_path / "model.onnx.data").stat().st_size >= 3 * weights
    part.drop_weights()
    error = parity_error(part, tmp_path / "model.onnx", expected=expected)
    assert error <= part.tolerance


@pytest.mark.parametrize("precision", Precision)
def test_the_weights_of_one_model_are_in_memory_at_a_time(tiny, tmp_path, monkeypatch, precision):
    loaded, seen = {}, []
    load = Checkpoint.load

    def noted(opened, part, model_class, **options):
        module = load(opened, part, model_class, **options)
        if not opened.hollow:
            loaded[part] = module
        return module

    def converts(part, file, converted_to):
        held = {name for name, module in loaded.items() if not next(module.parameters()).is_meta}
        floats = {p.dtype for p in part.module.parameters() if p.is_floating_point()}
        seen.append((part.name, held - {"vae"}, floats - {torch.float32}))
        return _writes_new(part, file, converted_to)

    def compares(part, file, converted_to, expected):
        assert all(p.is_meta for p in part.module.parameters())
        assert len(expected) == 4
        return 0.0

    monkeypatch.setattr(Checkpoint, "load", noted)
    monkeypatch.setattr(repository_module, "to_onnx", converts)
    monkeypatch.setattr(repository_module, "parity_error", compares)
    monkeypatch.setattr(repository_module, "_memory", lambda *_: None)
    build(open_checkpoint(tiny), skeleton(tmp_path / "served"), precision=precision)
    half = {torch.float16} if precision is Precision.FP16 else set()
    held = [{"text_encoder"}, {"bert"}, {"fusion"}, {"unet"}, set()]
    assert seen == list(zip(MODELS, held, [half] * 5, strict=True))


@pytest.mark.parametrize("model", MODELS)
def test_a_build_that_fails_half_way_leaves_the_old_repository(
    tiny, repository, monkeypatch, model
):
    without_conversion(monkeypatch)

    def fails(part, *_):
        if part.name == model:
            raise ParityError(f"{model}: error")
        return 0.0

    monkeypatch.setattr(repository_module, "parity_error", fails)
    before = contents(repository)
    with pytest.raises(ParityError):
        build(open_checkpoint(tiny), repository)
    assert contents(repository) == before
    assert not (repository / STAGE).parent.exists()


def test_a_build_replaces_everything_it_made_before(tiny, tmp_path, monkeypatch):
    without_conversion(monkeypatch)
    folder = skeleton(tmp_path / "model_repository")
    stale = folder / "unet" / "1" / "model.onnx.data"
    stale.parent.mkdir(exist_ok=True)
    stale.write_bytes(b"of a larger model")
    build(open_checkpoint(tiny), folder)
    assert (folder / "unet" / "1" / "model.onnx").read_bytes() == b"new"
    assert not stale.exists()


def test_a_full_disk_is_one_sentence_and_leaves_the_old_repository(tiny, repository):
    """A limit on file sizes stands for the disk: the same write fails in the same place."""
    before = contents(repository)
    command = [sys.executable, "-m", "export", str(tiny), "--repository", str(repository)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    assert done.returncode == 1
    assert f"cannot write into {repository}" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert contents(repository) == before
    assert not (repository / STAGE).parent.exists()


def test_the_command_names_a_missing_checkpoint(tmp_path):
    done = export_command(tmp_path / "nothing")
    assert done.exit_code == 1
    assert "is not there" in done.stdout
    assert "Traceback" not in done.output


def test_a_killed_export_leaves_the_old_repository_and_the_next_one_cleans_up(tiny, repository):
    before = contents(repository)
    command = [sys.executable, "-m", "export", str(tiny), "--repository", str(repository)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    left = repository / STAGE / "clip_text" / "1" / "model.onnx"
    while not left.exists():
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert contents(repository).items() > before.items()
    verify(repository)
    with staging(repository) as stage:
        assert not list(stage.iterdir())
    assert contents(repository) == before


@pytest.fixture
def old(tmp_path) -> Path:
    """A repository of files that say "old"."""
    folder = skeleton(tmp_path / "model_repository")
    for file in ("bert/1/model.onnx", "bert/1/model.plan", "unet/1/model.onnx", "MANIFEST.json"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("old")
    return folder


REPLACE = """
import os, signal, sys
from pathlib import Path
from export.staging import put_in_place, staging
renames = int(sys.argv[2])
def stops(source, target, rename=os.replace):
    global renames
    renames -= 1
    if renames < 0:
        if sys.argv[3] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os.replace = rename
        raise OSError("the disk is gone")
    rename(source, target)
with staging(Path(sys.argv[1])) as stage:
    for file in ("bert/1/model.onnx", "unet/1/model.onnx", "unet/1/model.onnx.data",
                 "MANIFEST.json"):
        (stage / file).parent.mkdir(parents=True, exist_ok=True)
        (stage / file).write_text("new")
    os.replace = stops
    put_in_place(stage, Path(sys.argv[1]))
"""


def put_new_files_in_place(old: Path, renames: int, then: str) -> int:
    """In a process of its own, which after some renames fails or is killed; its exit code."""
    command = [sys.executable, "-c", REPLACE, str(old), str(renames), then]
    return subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL).returncode


def test_files_are_put_in_place_together(old):
    assert put_new_files_in_place(old, 99, "fail") == 0
    made = {p.relative_to(old).as_posix(): p.read_text() for p in old.rglob("*")
            if p.is_file() and p.suffix not in (".pbtxt", ".py")}  # fmt: skip
    names = ("bert/1/model.onnx", "unet/1/model.onnx", "unet/1/model.onnx.data", "MANIFEST.json")
    assert made == dict.fromkeys(names, "new")


@pytest.mark.parametrize("renames", [0, 1, 3, 6, 8])
def test_a_rename_that_fails_leaves_the_old_repository(old, renames):
    before = contents(old)
    assert put_new_files_in_place(old, renames, "fail") == 1
    assert contents(old) == before


@pytest.mark.parametrize("renames", [1, 3, 6, 8])
def test_an_export_killed_among_its_renames_is_put_back_by_the_next(old, renames):
    before = contents(old)
    assert put_new_files_in_place(old, renames, "kill") == -signal.SIGKILL
    assert not contents(old).items() >= before.items()
    with staging(old):
        assert contents(old).items() >= before.items()
    assert contents(old) == before


def test_two_exports_into_one_repository_are_refused(old):
    with staging(old) as stage:
        with pytest.raises(OSError, match="another export builds into it"), staging(old):
            pass
        assert stage.is_dir()


@pytest.fixture
def refused(tiny, old):
    """Runs the export command on the tiny checkpoint; gives the sentence that it ends with."""

    def run(*flags: str | Path) -> str:
        before = contents(old)
        done = export_command(tiny, "--repository", old, *flags)
        assert done.exit_code == 1
        assert len(done.stdout.strip().splitlines()) == 1
        assert contents(old) == before
        return done.stdout

    return run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--report", "{here}"], "--report {here} is a folder: name a file"),
        (["--revision", "v1"], "is a folder, only a hub id has revisions"),
        (["--bert-revision", "v1"], "--bert-revision v1: there is no --bert"),
        (["--bert", "{here}", "--bert-revision", "v1"], "--bert-revision v1: {here} is a folder"),
        (["--report", "{here}/[v2]/table"], "{here}/[v2] is no folder"),
    ],
)
def test_flags_that_cannot_be_followed_are_refused(refused, tmp_path, flags, message):
    flags = [flag.format(here=tmp_path) for flag in flags]
    assert message.format(here=tmp_path) in refused(*flags)


def test_a_report_that_cannot_be_written_is_told_before_anything_is_built(
    refused, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)  # root can write anywhere
    report = tmp_path / "table.json"
    assert f"--report {report} cannot be written" in refused("--report", report)


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json"])
def test_a_file_that_cannot_be_read_is_named(refused, tiny, monkeypatch, name):
    read = Path.read_text

    def denied(path, *given, **named):
        if path == Path(tiny, name):
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(path, *given, **named)

    monkeypatch.setattr(Path, "read_text", denied)
    assert f"{Path(tiny, name)} cannot be read: Permission denied" in refused()


@pytest.mark.parametrize("model", ["unet", "text_to_image"])
def test_a_config_that_is_missing_is_named_before_anything_is_converted(
    refused, old, monkeypatch, model
):
    monkeypatch.setattr(repository_module, "load_parts", None)
    (old / model / "config.pbtxt").unlink()
    assert f"{old / model / 'config.pbtxt'} is not there" in refused()


def test_a_manifest_that_cannot_be_read_keeps_no_model(refused):
    assert "MANIFEST.json cannot be read" in refused("--only", "unet")


@pytest.mark.parametrize("fails", ["run by PyTorch", "converted to ONNX"])
def test_a_model_that_pytorch_cannot_run_or_convert_is_named(refused, monkeypatch, fails):
    before = ClipText.forward

    def forward(self, input_ids):
        if fails == "run by PyTorch" or torch.compiler.is_exporting():
            raise ValueError("no such attention")
        return before(self, input_ids)

    monkeypatch.setattr(ClipText, "forward", forward)
    monkeypatch.setattr(repository_module, "to_onnx", to_onnx)  # not what was converted before
    monkeypatch.setattr("export.convert.trace", trace)
    assert f"clip_text cannot be {fails}: no such attention" in refused()


def test_a_model_that_is_named_twice_is_built_once(tiny, tmp_path, monkeypatch):
    without_conversion(monkeypatch)
    folder = skeleton(tmp_path / "model_repository")
    twice = ",".join([*MODELS, "unet"])
    done = export_command(tiny, "--repository", folder, "--only", twice)
    assert done.exit_code == 0
    assert done.stdout.count("unet") == 1
