"""LoRA files: fused as diffusers fuses them, or refused by name."""

import json
import shutil

import onnxruntime as ort
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from harness import export_command
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from export.checkpoint import Serving, open_checkpoint
from export.lora import Lora, _layers, check_loras, read_lora
from export.prune import prune_checkpoint
from export.repository import load_parts
from networks.loading import CheckpointError

RANK, ALPHA, SCALE = 4, 2.0, 0.7
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET = [
    f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn2.to_out.0",
    f"{BLOCK}.ff.net.0.proj", "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.time_emb_proj",
    "down_blocks.0.downsamplers.0.conv", "mid_block.resnets.1.conv2",
    "up_blocks.1.attentions.1.proj_out", "up_blocks.1.resnets.0.conv_shortcut",
]  # fmt: skip
TEXT = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.out_proj",
        "encoder.layers.1.mlp.fc1"]  # fmt: skip


@pytest.fixture(scope="session")
def layers(tiny) -> dict:
    """All chosen layers of the checkpoint, by part and name."""
    opened = open_checkpoint(tiny)
    unet = opened.load("unet", UNet2DConditionModel)
    text = opened.load("text_encoder", CLIPTextModel)
    found = {("unet", name): unet.get_submodule(name) for name in UNET}
    return found | {("text_encoder", name): text.get_submodule(name) for name in TEXT}


def factors(layer, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A down and an up factor of random values for a layer."""
    generator = torch.Generator().manual_seed(seed)
    out, into, *kernel = layer.weight.shape
    ones = [1] * len(kernel)
    down = torch.randn(RANK, into, *kernel, generator=generator) * 0.2
    return down, torch.randn(out, RANK, *ones, generator=generator) * 0.2


def kohya(part, name):
    if part == "unet":
        start = "lora_unet_" + name.replace(".", "_")
    else:
        start = "lora_te_text_model_" + name.replace(".", "_")
    return f"{start}.lora_down.weight", f"{start}.lora_up.weight", f"{start}.alpha"


def diffusers_keys(part, name):
    if part == "unet":
        start = f"unet.{name}.lora"
    else:
        start = f"text_encoder.text_model.{name}.lora_linear_layer"
    return f"{start}.down.weight", f"{start}.up.weight", f"{part}.{name}.alpha"


def peft_keys(part, name):
    start = f"{part}." + ("text_model." if part == "text_encoder" else "") + name
    return f"{start}.lora_A.weight", f"{start}.lora_B.weight", f"{start}.alpha"


STYLES = {"kohya": kohya, "diffusers": diffusers_keys, "peft": peft_keys}


def write_lora(file, layers, keys, alpha=ALPHA, metadata=None):
    tensors = {}
    for seed, ((part, name), layer) in enumerate(layers.items()):
        down_key, up_key, alpha_key = keys(part, name)
        tensors[down_key], tensors[up_key] = factors(layer, seed)
        if alpha is not None:
            tensors[alpha_key] = torch.tensor(alpha)
    save_file(tensors, str(file), metadata)
    return file


def expected_weight(layer, seed, multiplier):
    """By the definition, one element of the kernel at a time."""
    down, up = factors(layer, seed)
    change = torch.einsum("or...,ri...->oi...", up.expand(*up.shape[:2], *down.shape[2:]), down)
    return layer.weight + multiplier * change


def fused_layers(tiny, *loras) -> dict:
    opened = open_checkpoint(tiny, serving=Serving(loras=tuple(map(read_lora, loras))))
    return {
        "unet": opened.load("unet", UNet2DConditionModel),
        "text_encoder": opened.load("text_encoder", CLIPTextModel),
    }


def assert_fused(tiny, layers, multiplier, *loras):
    plain, fused = fused_layers(tiny), fused_layers(tiny, *loras)
    for seed, ((part, name), layer) in enumerate(layers.items()):
        got = fused[part].get_submodule(name).weight
        torch.testing.assert_close(got, expected_weight(layer, seed, multiplier))
        assert not torch.equal(got, layer.weight)
    for part, network in plain.items():
        changed = {f"{name}.weight" for owner, name in layers if owner == part}
        for key, tensor in network.state_dict().items():
            if key not in changed:
                assert torch.equal(fused[part].state_dict()[key], tensor), key


@pytest.mark.parametrize("style", STYLES)
def test_factors_are_fused_with_scale_and_alpha_over_rank(tiny, layers, style, tmp_path):
    file = write_lora(tmp_path / "a.safetensors", layers, STYLES[style])
    assert_fused(tiny, layers, SCALE * ALPHA / RANK, f"{file}:{SCALE}")


def test_without_alpha_the_rank_does_not_matter(tiny, layers, tmp_path):
    file = write_lora(tmp_path / "a.safetensors", layers, kohya, alpha=None)
    assert_fused(tiny, layers, 1.0, str(file))


def test_several_loras_add_up(tiny, layers, tmp_path):
    first = write_lora(tmp_path / "a.safetensors", layers, kohya)
    second = write_lora(tmp_path / "b:2.safetensors", layers, peft_keys)
    assert_fused(tiny, layers, -0.5 * ALPHA / RANK, f"{first}:-1.5", str(second))


def test_keys_of_former_diffusers_are_read(tiny, layers, tmp_path):
    def former(part, name):
        owner, _, last = name.removesuffix(".0").rpartition(".")
        if part == "text_encoder":
            last = {"q_proj": "to_q", "out_proj": "to_out"}[last]
            start = f"text_encoder.text_model.{owner}.{last}_lora"
        else:
            start = f"{owner}.processor.{last}_lora"  # a UNet's own file had no prefix
        return f"{start}.down.weight", f"{start}.up.weight", ""

    some = {key: layer for key, layer in layers.items() if ".attn" in key[1] or "_attn" in key[1]}
    assert len(some) == 5
    file = write_lora(tmp_path / "a.safetensors", some, former, alpha=None)
    assert_fused(tiny, some, 1.0, str(file))


def test_alpha_of_the_header_is_applied(tiny, layers, tmp_path):
    settings = {"unet.lora_alpha": 8, "unet.r": RANK, "text_encoder.lora_alpha": 8,
                "unet.alpha_pattern": {}, "text_encoder.r": RANK}  # fmt: skip
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    file = write_lora(tmp_path / "a.safetensors", layers, peft_keys, None, metadata)
    assert_fused(tiny, layers, 8 / RANK, str(file))


def test_a_pattern_of_the_header_sets_the_alpha_of_its_layers(tiny, layers, tmp_path):
    some = {key: layer for key, layer in layers.items() if "to_q" in key[1]}
    settings = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 6}}
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    file = write_lora(tmp_path / "a.safetensors", some, peft_keys, None, metadata)
    assert_fused(tiny, some, 6 / RANK, str(file))


def test_peft_files_need_their_configuration(tiny, layers, tmp_path):
    def saved(part, name):
        return (f"base_model.model.{name}.lora_A.default.weight",
                f"base_model.model.{name}.lora_B.default.weight", "")  # fmt: skip

    some = {key: layer for key, layer in layers.items() if key[0] == "unet"}
    file = write_lora(tmp_path / "adapter_model.safetensors", some, saved, alpha=None)
    with pytest.raises(CheckpointError, match=r"adapter_config.json must be beside it"):
        read_lora(str(file))
    config = {"r": RANK, "lora_alpha": 8, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert_fused(tiny, some, 8 / RANK**0.5, str(file))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(CheckpointError, match=r"use_dora=True is not served"):
        read_lora(str(file))


def test_factors_of_a_1x1_convolution_fit_a_linear_layer(tiny, layers, tmp_path):
    name = f"{BLOCK}.attn1.to_q"
    layer = layers["unet", name]
    down, up = factors(layer, 0)
    tensors = {"lora_unet_" + name.replace(".", "_") + end: value for end, value in (
        (".lora_down.weight", down[..., None, None]), (".lora_up.weight", up[..., None, None]),
    )}  # fmt: skip
    save_file(tensors, str(tmp_path / "a.safetensors"))
    assert_fused(tiny, {("unet", name): layer}, 1.0, str(tmp_path / "a.safetensors"))


def test_a_tucker_decomposition_is_the_product_of_its_factors(tiny, layers, tmp_path):
    name = "down_blocks.0.resnets.0.conv1"
    layer, start = layers["unet", name], "lora_unet_" + name.replace(".", "_")
    out, into, *kernel = layer.weight.shape
    down, mid = torch.randn(3, into, 1, 1) * 0.2, torch.randn(RANK, 3, *kernel) * 0.2
    up = torch.randn(out, RANK, 1, 1) * 0.2
    tensors = {"lora_down": down, "lora_mid": mid, "lora_up": up}
    named = {f"{start}.{role}.weight": tensor for role, tensor in tensors.items()}
    save_file(named | {f"{start}.alpha": torch.tensor(6)}, str(tmp_path / "a.safetensors"))
    got = fused_layers(tiny, str(tmp_path / "a.safetensors"))["unet"].get_submodule(name)
    x = torch.randn(1, into, 8, 8)
    inner = torch.nn.functional.conv2d(x, down)
    change = torch.nn.functional.conv2d(inner, mid, padding=layer.padding)
    change = torch.nn.functional.conv2d(change, up) * 6 / RANK
    with torch.no_grad():
        torch.testing.assert_close(got(x), layer(x) + change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", ["base_model.model.unet.", "diffusion_model."])
def test_other_prefixes_of_the_unet_are_read(tiny, layers, prefix, tmp_path):
    def keys(part, name):
        if prefix == "diffusion_model.":  # ComfyUI, with the original names
            assert name == "down_blocks.0.resnets.0.conv1"
            name = "input_blocks.1.0.in_layers.2"
        return (
            f"{prefix}{name}.lora_A.my-style.weight",
            f"{prefix}{name}.lora_B.my-style.weight",
            "",
        )

    some = {key: layer for key, layer in layers.items() if key[1].endswith("0.conv1")}
    file = write_lora(tmp_path / "a.safetensors", some, keys, alpha=None)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": RANK}))
    assert_fused(tiny, some, 1.0, str(file))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": "8"}, "lora_alpha='8' is invalid: must be a number"),
        ({"alpha_pattern": [1]}, r"alpha_pattern=\[1\] is invalid"),
        ({"alpha_pattern": {"to_q": None}}, "to_q=None is invalid"),
        ({"alpha_pattern": {"(": 1}}, "is no regular expression"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not served"),
        ({"layer_replication": [[0, 4]]}, "layer_replication=.* is not served"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not served"),
    ],
)
def test_settings_that_change_what_factors_mean_are_refused(layers, settings, message, tmp_path):
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in settings.items()})}
    file = write_lora(tmp_path / "a.safetensors", layers, peft_keys, None, metadata)
    with pytest.raises(CheckpointError, match=message):
        read_lora(str(file))


def test_the_first_pattern_that_matches_a_name_sets_its_alpha(tiny, layers, tmp_path):
    some = {key: layer for key, layer in layers.items() if "to_q" in key[1]}
    patterns = {"ttn1.to_q": 3, r"down_blocks\..*to_q": 6, "attn1.to_q": 5}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": patterns})}
    file = write_lora(tmp_path / "a.safetensors", some, peft_keys, None, metadata)
    assert_fused(tiny, some, 6 / RANK, str(file))


SDXL = {
    "input_blocks_0_0": "conv_in",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_4_1_transformer_blocks_1_attn1_to_q":
        "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
    "input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
    "middle_block_0_emb_layers_1": "mid_block.resnets.0.time_emb_proj",
    "middle_block_1_transformer_blocks_0_attn2_to_out_0":
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_4_1_transformer_blocks_0_ff_net_2":
        "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.2",
    "output_blocks_8_0_out_layers_3": "up_blocks.2.resnets.2.conv2",
    "out_2": "conv_out",
}  # fmt: skip


def test_original_names_of_sdxl_are_those_that_diffusers_converts():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(32, 64, 128), layers_per_block=2, cross_attention_dim=32,
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
            up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"), attention_head_dim=8,
            transformer_layers_per_block=(1, 2, 3), addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
        )  # fmt: skip
    layers = _layers(unet)
    for original, name in SDXL.items():
        assert layers[original] is unet.get_submodule(name), original


@pytest.mark.parametrize("style", STYLES)
def test_fused_weights_equal_those_of_diffusers(tiny, layers, style, tmp_path):
    pytest.importorskip("peft")
    # diffusers reads alpha of kohya's keys only.
    file = write_lora(tmp_path / "a.safetensors", layers, STYLES[style],
                      alpha=ALPHA if style == "kohya" else None)  # fmt: skip
    plain = fused_layers(tiny)
    theirs = StableDiffusionPipeline(
        **plain, vae=None, tokenizer=None, scheduler=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    theirs.load_lora_weights(tmp_path, weight_name=file.name, local_files_only=True)
    theirs.fuse_lora(lora_scale=SCALE)
    theirs.unload_lora_weights()
    ours = fused_layers(tiny, f"{file}:{SCALE}")
    for part in ("unet", "text_encoder"):
        reference = getattr(theirs, part).state_dict()
        for key, tensor in ours[part].state_dict().items():
            torch.testing.assert_close(tensor, reference[key], msg=f"{part}.{key}")


def edited(edit):
    """A change of the tensors of a good file."""

    def write(folder, layers):
        file = write_lora(folder / "a.safetensors", layers, kohya)
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, str(file))
        return file

    return write


FIRST = kohya("unet", UNET[0])[0]


def damaged(content):
    def write(folder, layers):
        file = write_lora(folder / "a.safetensors", layers, kohya)
        file.write_bytes(content(file.read_bytes()))
        return file

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (edited(lambda t: t.pop(kohya("unet", UNET[0])[1])), rf"{FIRST[:-17]}.* has no up factor"),
        (edited(lambda t: t.update({FIRST: torch.ones(RANK, 7)})),
         r"has shape \[4, 7\], its layer has \[32, 32\]: must be \[4, 32\]"),
        (edited(lambda t: t.update({FIRST: torch.full((RANK, 32), float("nan"))})),
         rf"{FIRST} makes weights that are not finite"),
        (edited(lambda t: t.update({FIRST.replace("down.weight", "mid.weight"): torch.ones(1)})),
         r"lora_mid.weight has shape \[1\], its layer has \[32, 32\]: must be \[4, 4\]"),
        (edited(lambda t: t.update({FIRST: torch.ones(RANK, 32).to(torch.int8)})),
         "lora_down.weight has type I8, which is not read: F16, BF16, F32, F64 are"),
        (edited(lambda t: t.update({"lora_te3_x.lora_up.weight": torch.ones(1)})),
         "lora_te3_x.lora_up.weight is for a network that is not served: names must begin with"),
        (edited(lambda t: t.update({"lora_transformer_x.alpha": torch.ones(1)})),
         "lora_transformer_x.alpha is for a network that is not served"),
        (edited(lambda t: t.update({"lora_unet_x.oft_blocks": torch.ones(1)})), "of an OFT"),
        (edited(lambda t: t.update({"lora_unet_x.hada_w1_a": torch.ones(1)})), "of a LoHa"),
        (edited(lambda t: t.update({FIRST[:-17] + ".dora_scale": torch.ones(1)})), "of a DoRA"),
        (edited(lambda t: t.update({"lora_unet_x.bias": torch.ones(1)})), "is no key of a LoRA"),
        (edited(lambda t: t.update({"lora_unet_elsewhere.alpha": torch.ones(1)})),
         "lora_unet_elsewhere.alpha has no down factor"),
        (edited(lambda t: t.update({FIRST[:-17] + ".alpha": torch.ones(3)})),
         r"alpha has shape \[3\].*must be one number"),
        (edited(lambda t: [t.update({k.replace("attn1", "attn9"): t.pop(k)}) for k in [*t]]),
         r"attn9_to_q.lora_down.weight matches no layer of the checkpoint's unet"),
        (edited(lambda t: [t.update({k.replace("lora_te_", "lora_te2_"): t.pop(k)}) for k in [*t]]),
         r"is for text_encoder_2, which the checkpoint does not have"),
        (edited(lambda t: t.clear()), "has no tensors"),
        (damaged(lambda data: data[:-9]), "is cut short"),
        (damaged(lambda data: b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
        (damaged(lambda data: b"PK\x03\x04" + data), "a.safetensors"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_fused_whole_is_refused_by_key(
    tiny, layers, write, message, tmp_path
):
    file = write(tmp_path, layers)
    with pytest.raises(CheckpointError, match=message) as caught:
        fused_layers(tiny, str(file))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.pt", "is a pickle"),
        ("a.safetensors:much", "scale 'much' is invalid"),
        ("a.safetensors:0", "scale '0' is invalid"),
        ("a.safetensors:nan", "scale 'nan' is invalid"),
        ("b.safetensors", "b.safetensors is not there"),
        (".", "is a folder"),
    ],
)
def test_what_is_no_lora_file_is_refused(layers, name, message, tmp_path):
    write_lora(tmp_path / "a.safetensors", layers, kohya)
    with pytest.raises(CheckpointError, match=message):
        read_lora(str(tmp_path / name))
    for unnamed in ("", ":0.5"):
        with pytest.raises(CheckpointError, match=r"has no name: must be a \.safetensors file"):
            read_lora(unnamed)


@pytest.fixture(scope="session")
def unet_lora(layers, tmp_path_factory):
    chosen = {key: layer for key, layer in layers.items() if key[0] == "unet"}
    return write_lora(tmp_path_factory.mktemp("lora") / "style.safetensors", chosen, kohya)


def test_the_command_fuses_and_records_a_lora(tiny, repository, unet_lora, tmp_path):
    served = shutil.copytree(repository, tmp_path / "served")
    done = export_command(
        tiny, "--repository", served, "--only", "unet", "--lora", f"{unet_lora}:0.5",
        "--sampler", "lcm", "--default", "steps=2",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "style.safetensors is fused into unet with scale 0.5" in done.output
    assert "--sampler lcm replaces DDIMScheduler" in done.output
    models = json.loads((served / "MANIFEST.json").read_text())["models"]
    loras = {line["model"]: line["loras"] for line in models}
    record = read_lora(f"{unet_lora}:0.5").record()
    assert loras == {name: [] for name in loras} | {"unet": [record]}
    assert (record["file"], record["scale"], len(record["sha256"])) == (unet_lora.name, 0.5, 64)
    config = json.loads((served / "text_to_image_stream" / "1" / "pipeline.json").read_text())
    assert config["defaults"] == {"sampler": "lcm", "steps": 2, "guidance_scale": 3.0}
    serving = Serving(loras=(read_lora(f"{unet_lora}:0.5"),))
    part = load_parts(open_checkpoint(tiny, serving=serving))["unet"]
    inputs = part.example(1, 2)
    session = ort.InferenceSession(str(served / "unet" / "1" / "model.onnx"))
    (got,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        fused, plain = (
            parts["unet"].module(**inputs)
            for parts in ({"unet": part}, load_parts(open_checkpoint(tiny)))
        )
    torch.testing.assert_close(torch.from_numpy(got), fused, atol=1e-4, rtol=1e-4)
    assert (fused - plain).abs().max() > 1e-2


def test_guessed_defaults_are_printed_until_they_are_set(tiny, repository, tmp_path):
    served = shutil.copytree(repository, tmp_path / "served")
    copied = shutil.copytree(tiny, tmp_path / "copied")
    index = json.loads((copied / "model_index.json").read_text())
    del index["defaults"]
    (copied / "model_index.json").write_text(json.dumps(index))
    command = (copied, "--repository", served, "--only", "fusion")
    line = "guessed: 20 steps, guidance_scale 7.5; set them with --default"
    assert line in export_command(*command).output
    partly = export_command(*command, "--default", "steps=3").output
    assert "guessed: guidance_scale 7.5; set them with --default" in partly
    done = export_command(*command, "--default", "steps=3,guidance_scale=2")
    assert "guessed:" not in done.output
    assert "guessed:" not in export_command(tiny, *command[1:]).output
    config = json.loads((served / "text_to_image_stream" / "1" / "pipeline.json").read_text())
    assert config["defaults"] == {"sampler": "ddim", "steps": 4, "guidance_scale": 3.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "vqgan_decoder", "--lora", "{}"], "changes unet, which --only leaves out"),
        (["--lora", "{}", "--lora", "{}:0.5"], "given twice for one content"),
        (["--lora", "{}:x"], "scale 'x' is invalid"),
        (["--sampler", "plms"], "sampler='plms' is invalid: must be one of lcm"),
        (["--sampler", "lcm", "--default", "sampler=euler"], "sampler=euler: --sampler is lcm"),
        (["--default", "steps=0"], "default steps=0 is invalid: must be an integer between 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tiny, repository, unet_lora, options, message, tmp_path
):
    served = shutil.copytree(repository, tmp_path / "served")
    before = (served / "MANIFEST.json").read_bytes()
    filled = [option.format(unet_lora) for option in options]
    done = export_command(tiny, "--repository", served, *filled)
    assert done.exit_code == 1
    assert message in done.output
    assert (served / "MANIFEST.json").read_bytes() == before


def test_a_pruned_checkpoint_keeps_its_loras(tiny, layers, tmp_path):
    file = write_lora(tmp_path / "a.safetensors", layers, kohya)
    serving = Serving(sampler="euler", loras=(read_lora(str(file)),))
    pruned = prune_checkpoint(
        open_checkpoint(tiny, serving=serving), {"unet": 0.2}, tmp_path / "pruned"
    )
    assert pruned.serving == Serving(sampler="euler")
    again = open_checkpoint(tmp_path / "pruned", serving=serving)  # and it is not fused twice
    name = TEXT[0]
    seed = [*layers].index(("text_encoder", name))
    for opened in (pruned, again):
        got = opened.load("text_encoder", CLIPTextModel).get_submodule(name).weight
        wanted = expected_weight(layers["text_encoder", name], seed, ALPHA / RANK)
        torch.testing.assert_close(got, wanted)
        assert [r["file"] for r in opened.loras_of("unet")] == ["a.safetensors"]
    with pytest.raises(CheckpointError, match=r"has it fused already, with scale 1"):
        open_checkpoint(tmp_path / "pruned", serving=Serving(loras=(read_lora(f"{file}:2"),)))
    done = export_command(tmp_path / "pruned", "--gate", "--gate-against", tiny)
    assert done.exit_code == 1
    assert "lacks the LoRA a.safetensors" in done.output


def test_keys_are_checked_before_a_weight_is_read(tiny, layers, tmp_path):
    broken = shutil.copytree(tiny, tmp_path / "broken")
    for file in broken.glob("unet/*.safetensors"):
        file.unlink()
        file.write_bytes(b"no weights")
    wrong = write_lora(tmp_path / "a.safetensors", layers, lambda part, name: (
        f"lora_unet_{part}_{name}.lora_down.weight", f"lora_unet_{part}_{name}.lora_up.weight", "",
    ), alpha=None)  # fmt: skip
    with pytest.raises(CheckpointError, match="matches no layer"):
        open_checkpoint(broken, serving=Serving(loras=(read_lora(str(wrong)),)))


def test_a_lora_for_another_part_changes_nothing_else():
    lora = Lora(None, 1.0, "", ())
    check_loras([lora], lambda part: pytest.fail(f"{part} is not needed"))
