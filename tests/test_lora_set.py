"""LoRAs that requests switch on: as fused ones, as diffusers, and beside each other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from families import FAMILIES, shallow, write_family
from harness import export_command, open_engine, skeleton
from safetensors.torch import save_file
from test_engine import Client, Watched, pixels, request
from test_families import PROMPT, draws, options_of
from test_lora import RANK, factors, kohya, write_lora
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from export.checkpoint import Serving, open_checkpoint
from export.lora import _original_name, read_lora
from export.lora_set import LayerWithLoras
from export.painting import paint
from export.precision import Precision, in_precision
from export.repository import build, load_parts
from twinbrush.engine.config import PipelineConfig
from twinbrush.engine.fields import InvalidArgument
from twinbrush.engine.loras import parse_loras
from twinbrush.engine.request import describe_server
from twinbrush_client import Client as RemoteClient

SD1, XL = "runwayml/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
UNET = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.time_emb_proj",
    "down_blocks.0.downsamplers.0.conv", "up_blocks.1.attentions.1.proj_out",
]  # fmt: skip
UNET_XL = ["down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q", "add_embedding.linear_1"]
# Diffusers reads kohya's names of a tower only where the output projection of attention is there.
TEXT = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.out_proj",
        "encoder.layers.1.mlp.fc1"]  # fmt: skip
CLASSES = {"unet": diffusers.UNet2DConditionModel, "text_encoder": CLIPTextModel,
           "text_encoder_2": CLIPTextModelWithProjection}  # fmt: skip


def keys(part: str, name: str) -> tuple[str, str, str]:
    down, up, alpha = kohya(part, name)
    if part == "text_encoder_2":
        down, up, alpha = (key.replace("lora_te_", "lora_te2_") for key in (down, up, alpha))
    return down, up, alpha


def loras(folder: Path, source: Path, chosen: dict[str, list[str]]) -> dict[str, Path]:
    """Two LoRA files: `ink` changes every chosen layer, `film` only those of the UNet."""
    opened = open_checkpoint(source)
    networks = {part: opened.load(part, CLASSES[part]) for part in chosen}
    layers = {
        (part, name): networks[part].get_submodule(
            f"text_model.{name}" if part == "text_encoder_2" else name
        )
        for part, names in chosen.items()
        for name in names
    }
    reversed_unet = {key: layers[key] for key in reversed(layers) if key[0] == "unet"}
    return {
        "ink": write_lora(folder / "ink.safetensors", layers, keys),
        "film": write_lora(folder / "film.safetensors", reversed_unet, keys, alpha=None),
    }


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    return write_family(tmp_path_factory.mktemp("loras") / "source", shallow(FAMILIES[SD1]))


@pytest.fixture(scope="session")
def files(source, tmp_path_factory) -> dict[str, Path]:
    return loras(tmp_path_factory.mktemp("files"), source, {"unet": UNET, "text_encoder": TEXT})


@pytest.fixture(scope="session")
def served(source, files, tmp_path_factory) -> Path:
    """A repository whose requests can switch on `ink` and `film`."""
    folder = skeleton(tmp_path_factory.mktemp("served-loras") / "model_repository")
    lora_set = {name: read_lora(str(file)) for name, file in files.items()}
    build(open_checkpoint(source, serving=Serving(lora_set=lora_set)), folder)
    return folder


@pytest.mark.parametrize("name", [SD1, XL])
@torch.no_grad()
def test_switched_on_equals_fused_at_the_same_scale(name, tmp_path):
    source = write_family(tmp_path / "source", shallow(FAMILIES[name]))
    chosen = {"unet": UNET, "text_encoder": TEXT}
    if name == XL:
        chosen = {"unet": UNET_XL, "text_encoder": TEXT, "text_encoder_2": TEXT}
    files = loras(tmp_path, source, chosen)
    lora_set = {name: read_lora(str(file)) for name, file in files.items()}
    parts = load_parts(open_checkpoint(source, serving=Serving(lora_set=lora_set)))
    plain = load_parts(open_checkpoint(source))
    for scales in ((0.7, 0.0), (0.0, -1.5), (0.5, 2.0)):
        fused = tuple(
            read_lora(f"{file}:{scale}")
            for file, scale in zip(files.values(), scales, strict=True)
            if scale
        )
        wanted = load_parts(open_checkpoint(source, serving=Serving(loras=fused)))
        for part in [f"clip_{part}" for part in ("text", "text_2")[: len(chosen) - 1]] + ["unet"]:
            inputs = plain[part].example(2, 2)
            # The other row has no LoRA: each row has its own scales.
            rows = torch.tensor([scales, (0.0, 0.0)])
            got = parts[part].run(inputs | {"lora_scale": rows})
            for output, expected in wanted[part].run(inputs).items():
                torch.testing.assert_close(got[output][0], expected[0], atol=1e-4, rtol=1e-4)
                untouched = plain[part].run(inputs)[output][1]
                torch.testing.assert_close(got[output][1], untouched, atol=1e-5, rtol=1e-5)
        changed = plain["unet"].run(inputs)["model_output"]
        assert (changed[0] - wanted["unet"].run(inputs)["model_output"][0]).abs().max() > 1e-2


def test_pictures_are_those_of_diffusers_with_adapters(source, files, served):
    pytest.importorskip("peft")
    family = FAMILIES[SD1]
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(source, **options_of(family))
    pipeline.set_progress_bar_config(disable=True)
    for name, file in files.items():
        pipeline.load_lora_weights(
            file.parent, weight_name=file.name, adapter_name=name, local_files_only=True
        )
    engine = open_engine(served)
    fields = {"steps": np.array([4]), "guidance_scale": np.array([7.5])}
    pictures = []
    for scales in ((0.7, 0.0), (0.0, 0.9), (0.6, -0.8)):
        pipeline.set_adapters([*files], [*scales])
        theirs = 255 * pipeline(
            PROMPT, num_inference_steps=4, guidance_scale=7.5, latents=draws()(),
            output_type="np",
        ).images[0]  # fmt: skip
        lora = ",".join(f"{name}:{scale}" for name, scale in zip(files, scales, strict=True))
        (ours,) = paint(engine, [PROMPT], lora=np.array([lora.encode()], object), **fields)
        assert np.abs(ours - theirs).max() <= 2
        pictures.append(theirs)
    (plain,) = paint(engine, [PROMPT], **fields)
    engine.close()
    assert all(np.abs(picture - plain).max() > 10 for picture in pictures)


def test_requests_of_different_loras_share_calls_and_keep_their_pictures(served):
    watched = Watched(served)
    engine = open_engine(served, watched)
    loras = ("ink:0.8", "film", "ink:-0.5,film:2", None)
    wanted = [
        request(engine, steps=4, **({"lora": lora} if lora else {}), guidance_scale=3.0)
        for lora in loras
    ]
    alone = [Client(engine, each).images[0] for each in wanted]
    assert set(watched.calls) == {2}
    assert len(set(alone)) == len(loras)
    watched.calls.clear()
    together = [Client(engine, each) for each in wanted]
    for client, image in zip(together, alone, strict=True):
        assert np.abs(pixels(client.images[0]) - pixels(image)).max() <= 1
    assert max(watched.calls) > 2
    engine.close()


def test_a_server_lists_its_loras_and_its_manifest_records_them(served, files):
    config = PipelineConfig.load(served / "text_to_image_stream" / "1" / "pipeline.json")
    assert describe_server(config)["loras"] == ["ink", "film"]
    models = json.loads((served / "MANIFEST.json").read_text())["models"]
    names = {line["model"]: [r["name"] for r in line["lora_set"]] for line in models}
    assert names["unet"] == ["ink", "film"]
    assert names["clip_text"] == ["ink"]
    assert names["vqgan_decoder"] == []


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("oil", r"lora='oil' is invalid: 'oil' is no LoRA of .*: must be one of ink, film"),
        ("ink:11", "the scale of 'ink' must be a number between -10 and 10"),
        ("ink:x", "the scale of 'ink' must be a number"),
        ("ink:nan", "the scale of 'ink' must be a number"),
        ("ink,ink:2", "'ink' must come once"),
        ("ink,,film", "'' is no LoRA"),
        ("ink " * 600, "must have at most"),
    ],
)
def test_what_is_no_lora_of_the_checkpoint_is_refused(served, lora, message):
    engine = open_engine(served)
    with pytest.raises(InvalidArgument, match=message):
        request(engine, lora=lora)
    engine.close()


def test_a_checkpoint_without_loras_refuses_the_field(engine):
    with pytest.raises(
        InvalidArgument, match=r"lora='ink' is invalid: .* has no LoRAs; .*--lora-s"
    ):
        request(engine, lora="ink")


def test_scales_stand_in_the_order_of_the_set():
    assert parse_loras(" b : 0.5 , a", ["a", "b", "c"]) == (1.0, 0.5, 0.0)
    assert parse_loras("", ["a", "b"]) == (0.0, 0.0)


@torch.no_grad()
def test_factors_are_halved_with_the_weights(source, files):
    serving = Serving(lora_set={"ink": read_lora(str(files["ink"]))})
    part = load_parts(open_checkpoint(source, serving=serving))["unet"]
    half = in_precision(part, Precision.FP16)
    layers = [m for m in half.modules() if isinstance(m, LayerWithLoras)]
    assert len(layers) == len(UNET)
    assert {m.down.dtype for m in layers} == {torch.float16}
    inputs = part.example(2, 2)
    error = (half(**inputs) - part.module(**inputs)).abs().max()
    assert error <= Precision.FP16.tolerance(part) * part.module(**inputs).abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora-set", "{ink}"], "is invalid: must be NAME=FILE"),
        (["--lora-set", "a b={ink}"], "is invalid: must be NAME=FILE"),
        (["--lora-set", "a={ink}", "--lora-set", "a={film}"], "--lora-set a is named twice"),
        (["--lora-set", "a={ink}:0.5"], "requests give the scale, as in a:0.8"),
        (["--lora-set", "a={ink}", "--lora", "{ink}"], "--lora fuses"),
        (["--lora-set", "a={ink}", "--prune", "unet=0.2"], "cannot be combined with --prune"),
        (["--lora-set", "a=nowhere.safetensors"], "nowhere.safetensors is not there"),
        (["--only", "fusion"], "has other tensors than this checkpoint's"),
        (
            ["--only", "fusion", "--lora-set", "ink={film}", "--lora-set", "film={ink}"],
            "has another --lora-set, and --only leaves it out",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(source, files, served, options, message, tmp_path):
    repository = shutil.copytree(served, tmp_path / "served")
    before = (repository / "MANIFEST.json").read_bytes()
    filled = [option.format(**files) for option in options]
    done = export_command(source, "--repository", repository, *filled)
    assert done.exit_code == 1
    assert message in " ".join(done.output.split())
    assert (repository / "MANIFEST.json").read_bytes() == before


def test_a_lora_through_the_real_server_paints_what_the_engine_paints(served, start_server):
    fields = {"steps": np.array([2]), "lora": np.array([b"ink:0.7"], object)}
    engine = open_engine(served)
    (wanted,) = paint(engine, [PROMPT], **fields)
    engine.close()
    server = start_server(served)
    server.wait_for("ready in")
    with RemoteClient(server.address) as client:
        (ours,) = client.generate(PROMPT, seed=0, steps=2, lora="ink:0.7")
        (plain,) = client.generate(PROMPT, seed=0, steps=2)
    server.stop()
    pixels = np.asarray(ours.convert("RGB"), float)
    assert np.abs(pixels - wanted).max() <= 1
    assert np.abs(pixels - np.asarray(plain.convert("RGB"), float)).max() > 2


def xl_keys(unet):
    """Kohya's names for SDXL, whose blocks are those of the original code."""

    def of(part, name):
        if part == "unet":
            name, start = _original_name(name, unet), "lora_unet_"
        else:
            start = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[part]
            start += "text_model_"
        start += name.replace(".", "_")
        return f"{start}.lora_down.weight", f"{start}.lora_up.weight", f"{start}.alpha"

    return of


@torch.no_grad()
def test_every_layer_of_sdxl_takes_a_lora_as_in_diffusers(tmp_path):
    """Ranks differ, and the names are those of the original code."""
    pytest.importorskip("peft")
    unet = FAMILIES[XL].unet | {"transformer_layers_per_block": (1, 2, 1)}
    source = write_family(tmp_path / "source", replace(FAMILIES[XL], unet=unet, layers=1))
    opened = open_checkpoint(source)
    networks = {part: opened.load(part, model_class) for part, model_class in CLASSES.items()}
    layers = {
        (part, name.removeprefix("text_model.")): layer
        for part, network in networks.items()
        for name, layer in network.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
        # Diffusers does not take these.
        and not name.startswith(("text_projection", "conv_", "time_emb", "add_emb"))
    }
    assert len(layers) > 190
    tensors = {}
    for seed, ((part, name), layer) in enumerate(layers.items()):
        down, up = factors(layer, seed)
        rank = 1 + seed % RANK
        keys = xl_keys(networks["unet"])(part, name)
        values = (down[:rank].bfloat16(), up[:, :rank].contiguous().bfloat16(), torch.tensor(2.0))
        tensors |= dict(zip(keys, values, strict=True))
    file = tmp_path / "style.safetensors"
    save_file(tensors, str(file))
    pipeline = diffusers.StableDiffusionXLPipeline(
        **{part: opened.load(part, model_class) for part, model_class in CLASSES.items()},
        vae=None, tokenizer=None, tokenizer_2=None, scheduler=None,
    )  # fmt: skip
    pipeline.load_lora_weights(tmp_path, weight_name=file.name, local_files_only=True)
    pipeline.fuse_lora(lora_scale=0.7)
    pipeline.unload_lora_weights()
    fused = open_checkpoint(source, serving=Serving(loras=(read_lora(f"{file}:0.7"),)))
    for part, model_class in CLASSES.items():
        wanted = getattr(pipeline, part).state_dict()
        for key, tensor in fused.load(part, model_class).state_dict().items():
            torch.testing.assert_close(tensor, wanted[key], msg=f"{part}.{key}")
