"""Checkpoint families: pictures equal those of diffusers' own pipelines, from the same noise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import diffusers
import diffusers.schedulers.scheduling_euler_ancestral_discrete as euler_ancestral
import diffusers.schedulers.scheduling_lcm as lcm
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from families import FAMILIES, Family, shallow, write_family
from harness import contents, open_engine, skeleton
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoTokenizer,
    DebertaTokenizer,
    DebertaV2Tokenizer,
    GPT2Tokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

from checkpoints import CAPTIONS, TEXT_MODELS, text_model
from export import pipeline
from export.checkpoint import open_checkpoint
from export.painting import paint
from export.part import Part
from export.precision import Precision, in_precision
from export.repository import build, load_parts
from export.source import Source
from export.tokenizer import TEXTS, check_ids
from networks.loading import CheckpointError
from twinbrush.engine.config import ENGINE
from twinbrush.engine.fields import InvalidArgument
from twinbrush_client import Client
from twinbrush_client.errors import InvalidRequest

PROMPT = "a large red circle left of a star"


def draws(channels: int = 4):
    """The noise of an image of seed 0, in the order in which the engine draws it."""
    rng, shape = np.random.default_rng(0), (1, channels, 16, 16)
    return lambda *_, **__: torch.from_numpy(rng.standard_normal(shape, np.float32))


def paint_with_diffusers(source: Path, family: Family, monkeypatch, **options) -> np.ndarray:
    """The pixels, (H, W, 3) from 0 to 255, of the checkpoint's own pipeline."""
    pipeline = getattr(diffusers, family.pipeline).from_pretrained(source, **options_of(family))
    pipeline.set_progress_bar_config(disable=True)
    if not hasattr(pipeline.text_encoder, "text_model"):  # as clip_skip of diffusers names it
        vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder
    if family.vq:  # pipelines hand a generator to the decoder, which VQModel does not take
        decode = pipeline.vae.decode
        pipeline.vae.decode = lambda latent, generator=None, **kept: decode(latent, **kept)
    draw = draws(family.latent_channels)
    for module in (lcm, euler_ancestral):
        monkeypatch.setattr(module, "randn_tensor", draw)
    latents = draw()
    return 255 * pipeline(
        PROMPT, num_inference_steps=family.steps, guidance_scale=family.guidance_scale,
        latents=latents, output_type="np", **options,
    ).images[0]  # fmt: skip


def options_of(family: Family) -> dict:
    return {} if family.xl else {"safety_checker": None, "feature_extractor": None}


class TorchModels:
    """The parts of a checkpoint in PyTorch, in the place of their ONNX files."""

    def __init__(self, parts: dict[str, Part]):
        self._parts = parts

    @torch.no_grad()
    def run(self, model: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        return {name: out.numpy() for name, out in self._parts[model].run(tensors).items()}


def paint_served(repository: Path, family: Family, models=None, **fields: np.ndarray) -> np.ndarray:
    engine = open_engine(repository, models)
    try:
        (picture,) = paint(
            engine, [PROMPT], steps=np.array([family.steps]),
            guidance_scale=np.array([family.guidance_scale]), **fields,
        )  # fmt: skip
    finally:
        engine.close()
    return picture


def paint_in_pytorch(source: Source, family: Family, folder: Path) -> np.ndarray:
    """What the engine paints with the parts of a checkpoint that is not exported."""
    repository, opened = skeleton(folder / "served"), open_checkpoint(source)
    parts = load_parts(opened)
    pipeline.write(opened, parts, repository / ENGINE)
    return paint_served(repository, family, TorchModels(parts))


# Exported with few layers; `family_table` exports all of them with all layers.
EXPORTED = (
    "SimianLuo/LCM_Dreamshaper_v7", "stabilityai/stable-diffusion-xl-base-1.0",
    *(pytest.param(name, marks=pytest.mark.slow)
      for name in ("runwayml/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1")),
)  # fmt: skip


@pytest.mark.parametrize("name", EXPORTED)
def test_pictures_are_those_of_diffusers_own_pipeline(name, exported, monkeypatch):
    family = FAMILIES[name]
    source, repository = exported(name)
    ours = paint_served(repository, family)
    theirs = paint_with_diffusers(source, family, monkeypatch)
    assert theirs.std() > 2
    assert np.abs(ours - theirs).max() <= 2


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_in_pytorch_paint_what_diffusers_paints(name, tmp_path, monkeypatch):
    family = FAMILIES[name]
    source = write_family(tmp_path / "source", family)
    ours = paint_in_pytorch(Source(str(source)), family, tmp_path)
    theirs = paint_with_diffusers(source, family, monkeypatch)
    assert theirs.std() > 2
    assert np.abs(ours - theirs).max() <= 2


def test_a_scheduler_of_tcd_paints_what_diffusers_pipeline_paints(tmp_path, monkeypatch):
    """Which passes an eta of 0, where the scheduler by itself has 0.3."""
    family = FAMILIES["runwayml/stable-diffusion-v1-5"]
    config = family.scheduler[1] | {"original_inference_steps": 50}
    family = shallow(replace(family, scheduler=("TCDScheduler", config)))
    source = write_family(tmp_path / "source", family)
    ours = paint_in_pytorch(Source(str(source)), family, tmp_path)
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
    _, repository = exported("SimianLuo/LCM_Dreamshaper_v7")
    with pytest.raises(InvalidArgument, match=r"target_size=\[64, 64\] is invalid: is no input"):
        paint_served(repository, FAMILIES[XL], target_size=np.array([64, 64]))


def test_a_text_model_beside_sdxl_changes_nothing_until_it_is_trained(exported, tmp_path):
    source, repository = exported(XL)
    served = Path(shutil.copytree(repository, tmp_path / "served"))
    opened = open_checkpoint(source, text_model(tmp_path / "bert", "bert"))
    build(opened, served, only=["bert", "fusion"])
    plain, beside = (paint_served(place, FAMILIES[XL]) for place in (repository, served))
    assert 'name: "bert"' in (served / "bert" / "config.pbtxt").read_text()
    assert np.abs(plain.astype(int) - beside).max() <= 1


def test_models_that_a_checkpoint_lacks_leave_the_repository(exported, tmp_path, monkeypatch):
    plain, repository = exported("SimianLuo/LCM_Dreamshaper_v7")
    served = Path(shutil.copytree(exported(XL)[1], tmp_path / "served"))
    assert (served / "clip_text_2" / "1" / "model.onnx").exists()

    def to_onnx(part, file, precision):
        shutil.copy(repository / part.name / "1" / "model.onnx", file)
        return 2, 1

    monkeypatch.setattr("export.repository.to_onnx", to_onnx)
    build(open_checkpoint(plain), served)
    assert not (served / "clip_text_2").exists()
    models = json.loads((served / "MANIFEST.json").read_text())["models"]
    assert [m["model"] for m in models] == ["clip_text", "fusion", "unet", "vqgan_decoder"]
    assert not [name for name in contents(served) if "clip_tokenizer_2" in name]


def test_clip_skip_is_that_of_diffusers(tmp_path, monkeypatch):
    family = shallow(FAMILIES["runwayml/stable-diffusion-v1-5"])
    plain = replace(family, guidance_scale=1.0)  # diffusers skips for the prompt alone
    source = write_family(tmp_path / "source", family)
    ours = paint_in_pytorch(Source(str(source), clip_skip=1), plain, tmp_path)
    theirs = paint_with_diffusers(source, plain, monkeypatch, clip_skip=1)
    assert np.abs(ours - theirs).max() <= 2
    with pytest.raises(CheckpointError, match="--clip-skip 2 is invalid: text_encoder has 3"):
        open_checkpoint(Source(str(source), clip_skip=2))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet", {"class_embed_type": "timestep"}, "unet has class_embed_type timestep"),
        ("unet", {"num_class_embeds": 3}, "unet has num_class_embeds 3"),
        ("unet", {"encoder_hid_dim": 32}, "unet has encoder_hid_dim 32"),
        ("unet", {"dual_cross_attention": True}, "unet has dual_cross_attention"),
        ("unet", {"attention_type": "gated"}, "unet has attention_type gated"),
        ("unet", {"addition_embed_type": "image"}, "unet has addition_embed_type image"),
        ("unet", {"addition_embed_type": None}, "must be text_time"),
        ("unet", {"addition_time_embed_dim": 9}, "unet has projection_class_embeddings_input_dim"),
        ("unet", {"cross_attention_dim": 32}, "text_encoder_2 have together 72"),
        ("text_encoder_2", {"max_position_embeddings": 20}, "text_encoder_2 has 20"),
    ],
)
def test_what_no_prompt_gives_is_refused_before_weights_are_read(
    part, change, message, exported, tmp_path
):
    source = Path(shutil.copytree(exported(XL)[0], tmp_path / "source"))
    for weights in source.rglob("*.safetensors"):
        weights.write_bytes(b"")
    file = source / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(source)


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_exported_token_ids_are_those_of_the_tokenizer(kind, exported, tmp_path):
    folder = text_model(tmp_path / kind, kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    file = tmp_path / "tokenizer.json"
    tokenizer.backend_tokenizer.save(str(file))
    check_ids(tokenizer, folder, file)
    changed = json.loads(file.read_text())
    changed["normalizer"] = {"type": "Prepend", "prepend": "x"}
    file.write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match="the exported tokenizer gives other ids for 'a'"):
        check_ids(tokenizer, folder, file)


# As hub repositories hold them; that of ModernBERT has no class of its own.
TOKENIZERS = {
    "roberta": RobertaTokenizer, "xlm-roberta": XLMRobertaTokenizer, "deberta": DebertaTokenizer,
    "deberta-v2": DebertaV2Tokenizer, "t5": T5Tokenizer, "gpt2": GPT2Tokenizer,
    "modernbert": None,
}  # fmt: skip


def write_tokenizer(folder: Path, kind: str) -> PreTrainedTokenizerFast:
    tokenizer_class = TOKENIZERS[kind]
    if tokenizer_class is not None:
        made = tokenizer_class().train_new_from_iterator(CAPTIONS, 400)
    else:
        words = Tokenizer(BPE())
        words.normalizer, words.pre_tokenizer = NFC(), ByteLevel(add_prefix_space=False)
        marks = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
        words.train_from_iterator(CAPTIONS, BpeTrainer(
            vocab_size=320, special_tokens=marks, initial_alphabet=ByteLevel.alphabet()
        ))  # fmt: skip
        words.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        made = PreTrainedTokenizerFast(
            tokenizer_object=words, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
            pad_token="[PAD]",
        )  # fmt: skip
    made.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return made


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_are_those_of_the_original_tokenizer_or_are_refused(kind, tmp_path):
    made = write_tokenizer(tmp_path / kind, kind)
    file, own = tmp_path / "exported.json", tmp_path / kind / "tokenizer.json"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / kind)
    tokenizer.backend_tokenizer.save(str(file))
    check_ids(tokenizer, own.parent, file)
    for text in TEXTS:
        assert Tokenizer.from_file(str(file)).encode(text).ids == made(text)["input_ids"]
    # A file that transformers reads otherwise than it is, as it rebuilds some normalisers.
    own.write_text(json.dumps(json.loads(own.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / kind)
    tokenizer.backend_tokenizer.save(str(file))
    original, exported = (Tokenizer.from_file(str(place)) for place in (own, file))
    same = all(original.encode(text).ids == exported.encode(text).ids for text in TEXTS)
    if same:
        check_ids(tokenizer, own.parent, file)
    else:
        with pytest.raises(CheckpointError, match="gives other ids for"):
            check_ids(tokenizer, own.parent, file)


def test_sdxl_through_the_real_server(exported, start_server, monkeypatch):
    source, repository = exported(XL)
    family = FAMILIES[XL]
    theirs = paint_with_diffusers(source, family, monkeypatch, original_size=(30, 90))
    server = start_server(repository)
    server.wait_for("ready in")
    with Client(server.address) as client:
        (picture,) = client.generate(
            PROMPT, seed=0, steps=family.steps, guidance_scale=family.guidance_scale,
            original_size=(30, 90),
        )  # fmt: skip
        with pytest.raises(InvalidRequest, match="target_size"):
            client.generate(PROMPT, target_size=(0, 5))
    server.stop()
    pixels = np.asarray(picture.convert("RGB"), float)
    assert np.abs(pixels - theirs).max() <= 2


def shallow_parts(folder: Path, name: str) -> dict[str, Part]:
    return load_parts(open_checkpoint(write_family(folder, shallow(FAMILIES[name]))))


def test_sdxls_decoder_keeps_full_precision_in_fp16(tmp_path):
    part = shallow_parts(tmp_path / "xl", XL)["vqgan_decoder"]
    halved = in_precision(part, Precision.FP16)
    assert {p.dtype for p in halved.parameters()} == {torch.float32}


class Joined(TorchDispatchMode):
    """Notes the types of tensors that are joined: PyTorch widens the others, ONNX does not."""

    def __init__(self):
        super().__init__()
        self.types: list[set[torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.cat:
            self.types.append({tensor.dtype for tensor in args[0]})
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_towers_whose_files_ask_for_tuples_are_read(tmp_path):
    source = write_family(tmp_path / "xl", shallow(FAMILIES[XL]))
    bert = text_model(tmp_path / "bert", "bert")
    example = {}
    for asked in (True, False):
        for folder in (source / "text_encoder", source / "text_encoder_2", bert):
            file = folder / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"return_dict": asked}))
        parts = load_parts(open_checkpoint(source, bert))
        for name in ("clip_text", "clip_text_2", "bert"):
            inputs, theirs = example.setdefault(name, (parts[name].example(2, 2), {}))
            out = parts[name].run(inputs)
            assert all(torch.equal(out[key], theirs.setdefault(key, out[key])) for key in out)


@torch.no_grad()
@pytest.mark.parametrize("name", [XL, "SimianLuo/LCM_Dreamshaper_v7"])
def test_only_tensors_of_one_type_are_joined_in_fp16(tmp_path, name):
    joined = Joined()
    for part in shallow_parts(tmp_path / "source", name).values():
        halved = in_precision(part, Precision.FP16)
        with joined:
            halved(**part.example(2, 2))
    assert {len(types) for types in joined.types} == {1}


def test_upcast_attention_has_finite_logits_in_fp16(tmp_path):
    part = shallow_parts(tmp_path / "sd2", "stabilityai/stable-diffusion-2-1")["unet"]
    for module in part.module.modules():
        if isinstance(module, Attention):  # logits of about 1e6, FP16 ends at 65,504
            for layer in (module.to_q, module.to_k):
                torch.nn.init.constant_(layer.weight, 40.0)
    inputs = part.example(1, 2) | {"encoder_hidden_states": torch.full((1, 16, 32), 4.0)}
    with torch.no_grad():
        assert torch.isfinite(in_precision(part, Precision.FP16)(**inputs)).all()
