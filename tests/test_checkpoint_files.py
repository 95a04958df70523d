"""Files of checkpoints: variants, shards, single files, parts of other places, and refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from families import END, EULER, FAMILIES, START, XL_UNET, Family, shallow, write_family
from safetensors.torch import load_file, save_file
from single_file import as_2_x, as_convolution, vae_name, write_single_file, write_xl_single_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from checkpoints import stable_diffusion, text_model
from export import layout
from export.checkpoint import Serving, open_checkpoint
from export.checks import check_values
from export.macs import native_rows
from export.pipeline import write
from export.repository import load_outlines, load_part, load_parts
from export.single_file import unpack
from export.sizes import native_size, scale_factor
from export.source import Source, looks_like_path
from networks.loading import CheckpointError
from twinbrush.engine.config import PipelineConfig


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A checkpoint as Stable Diffusion 1.5 is one."""
    return stable_diffusion(tmp_path_factory.mktemp("plain") / "plain", distilled=False)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return text_model(tmp_path_factory.mktemp("bert") / "tiny-bert", "bert")


@pytest.fixture
def copied(plain, tmp_path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "copied"))


def weights_of(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def outputs(source: Source) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {
            name: part.module(**part.example(2, 2))
            for name, part in load_parts(open_checkpoint(source)).items()
        }


def assert_equal_outputs(source: Source, wanted: Source, **tolerance: float) -> None:
    ours, theirs = outputs(source), outputs(wanted)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, msg=name, **tolerance)


def halve(folder: Path, name: str) -> None:
    """Replaces the weights of a part by half-precision ones under another name."""
    file = weights_of(folder)
    halved = {key: tensor.half() for key, tensor in load_file(file).items()}
    file.unlink()
    save_file(halved, folder / name, {"format": "pt"})


def test_weights_that_exist_as_fp16_only_are_found(copied, plain, bert):
    for part in ("unet", "vae"):
        halve(copied / part, "diffusion_pytorch_model.fp16.safetensors")
    halve(copied / "text_encoder", "model.fp16.safetensors")
    opened = open_checkpoint(copied, bert)
    assert {opened.weights[part][0] for part in ("unet", "vae", "text_encoder")} == {"fp16"}
    assert opened.weights["bert"][0] is None
    wanted = Source(str(plain), bert=str(bert))
    found = Source(str(copied), bert=str(bert))
    assert_equal_outputs(found, wanted, rtol=0.05, atol=0.02)


def test_a_variant_is_read_only_where_it_is_chosen(copied, bert):
    file = weights_of(copied / "unet")
    other = {key: tensor * 0.5 for key, tensor in load_file(file).items()}
    save_file(other, file.with_name("diffusion_pytorch_model.fp16.safetensors"), {"format": "pt"})
    for variant, factor in ((None, 1.0), ("fp16", 0.5)):
        opened = open_checkpoint(Source(str(copied), variant=variant, bert=str(bert)))
        unet = opened.load("unet", UNet2DConditionModel)
        wanted = load_file(file)["conv_in.weight"] * factor
        assert torch.equal(unet.conv_in.weight, wanted)
        assert opened.weights["vae"][0] is None
    with pytest.raises(CheckpointError, match=r"--variant bf16: no part has .* they have fp16"):
        open_checkpoint(Source(str(copied), variant="bf16", bert=str(bert)))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_put_together(copied, plain, bert, variant):
    for part, model_class in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        model = model_class.from_pretrained(copied / part)
        weights_of(copied / part).unlink()
        model.save_pretrained(copied / part, max_shard_size="60KB", variant=variant)
        assert len([*(copied / part).glob("*.safetensors")]) > 1
    wanted = Source(str(plain), bert=str(bert))
    assert_equal_outputs(Source(str(copied), bert=str(bert)), wanted)
    shard = max((copied / "unet").glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"unet lacks the shard {shard.name}, which"):
        open_checkpoint(copied, bert)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_decoder_alone_with_former_names_of_attention_is_read(copied, plain, bert, shards):
    file = weights_of(copied / "vae")
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(file).items():
        for now, then in former.items():
            name = name.replace(f".{now}.", f".{then}.")
        if not name.startswith(("encoder.", "quant_conv.")):
            tensors[name] = tensor
    assert any(".proj_attn." in name for name in tensors)
    if shards == 1:
        save_file(tensors, file, {"format": "pt"})
    else:
        file.unlink()
        shard_of = {name: f"{file.stem}-0000{1 + k % 2}-of-00002.safetensors"
                    for k, name in enumerate(tensors)}  # fmt: skip
        for shard in set(shard_of.values()):
            some = {name: tensor for name, tensor in tensors.items() if shard_of[name] == shard}
            save_file(some, file.with_name(shard), {"format": "pt"})
        index = json.dumps({"weight_map": shard_of})
        file.with_name(f"{file.name}.index.json").write_text(index)
    wanted = Source(str(plain), bert=str(bert))
    assert_equal_outputs(Source(str(copied), bert=str(bert)), wanted)


def test_a_checkpoint_may_be_in_a_subfolder(plain, bert, tmp_path):
    (tmp_path / "all").mkdir()
    shutil.copytree(plain, tmp_path / "all" / "inner")
    source = Source(str(tmp_path / "all"), subfolder="inner", bert=str(bert))
    assert open_checkpoint(source).folders["unet"] == tmp_path / "all" / "inner" / "unet"
    with pytest.raises(CheckpointError, match=r"--subfolder outer is not in .*: it has inner"):
        open_checkpoint(Source(str(tmp_path / "all"), subfolder="outer", bert=str(bert)))
    with pytest.raises(CheckpointError, match="leaves the checkpoint"):
        open_checkpoint(Source(str(tmp_path / "all"), subfolder="../x", bert=str(bert)))


def twin(folder: Path) -> Path:
    """A checkpoint with what a single file's family fixes: heads, groups and sizes."""
    source = stable_diffusion(folder, distilled=False)
    torch.manual_seed(1)
    UNet2DConditionModel(
        sample_size=64, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(source / "unet")  # fmt: skip
    vae_of_32_groups(source / "vae")
    encoder = CLIPTextModel.from_pretrained(source / "text_encoder")
    encoder.config.num_attention_heads = 1
    encoder.save_pretrained(source / "text_encoder")
    return source


def vae_of_32_groups(folder: Path) -> None:
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 64), sample_size=256,
    ).save_pretrained(folder)  # fmt: skip


@pytest.mark.parametrize("half", [False, True])
def test_a_single_file_is_what_its_folder_is(tmp_path, bert, monkeypatch, half):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = twin(tmp_path / "folder")
    file = write_single_file(folder, tmp_path / "one.safetensors")
    if half:  # and with the names of CLIP that older files have
        save_file(
            {k.replace(".text_model.", "."): v.half() for k, v in load_file(file).items()}, file
        )
    parts = {"bert": str(bert), "tokenizer": str(folder)}
    single, whole = Source(str(file), **parts), Source(str(folder), **parts)
    close = {"rtol": 0.05, "atol": 0.02} if half else {"rtol": 1e-5, "atol": 1e-5}
    assert_equal_outputs(single, whole, **close)
    written = []
    for source in (single, whole):
        opened = open_checkpoint(source)
        target = tmp_path / opened.name / "engine"
        target.mkdir(parents=True)
        write(opened, load_parts(opened), target)
        written.append(json.loads((target / "pipeline.json").read_text()))
        del written[-1]["checkpoint"], written[-1]["checkpoint_hash"]
        written[-1].pop("latent_to_rgb")
    assert written[0] == written[1]


def test_the_hash_is_of_the_file_or_of_all_weights(copied, plain, bert, tmp_path):
    folder = twin(tmp_path / "folder")
    file = write_single_file(folder, tmp_path / "one.safetensors")
    single = open_checkpoint(Source(str(file), bert=str(bert), tokenizer=str(folder)))
    assert single.weights_hash() == hashlib.sha256(file.read_bytes()).hexdigest()
    whole = open_checkpoint(plain, bert).weights_hash()
    assert open_checkpoint(copied, bert).weights_hash() == whole
    unet = weights_of(copied / "unet")
    save_file({key: 2 * tensor for key, tensor in load_file(unet).items()}, unet)
    assert open_checkpoint(copied, bert).weights_hash() != whole


def test_a_single_file_has_no_subfolder(plain, tmp_path):
    file = write_single_file(plain, tmp_path / "one.safetensors")
    source = Source(str(file), subfolder="x", tokenizer=str(plain))
    with pytest.raises(CheckpointError, match=r"--subfolder x: \S+\.safetensors is a file, only"):
        open_checkpoint(source)


def test_a_single_file_needs_a_tokenizer_and_says_so(plain, bert, tmp_path):
    file = write_single_file(plain, tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match=r"--tokenizer names a folder .* vocab\.json and"):
        open_checkpoint(file, bert)


def test_a_single_file_without_a_vae_takes_that_of_elsewhere(plain, bert, tmp_path):
    file = write_single_file(plain, tmp_path / "one.safetensors")
    tensors = {k: v for k, v in load_file(file).items() if not k.startswith("first_stage_model.")}
    save_file(tensors, file)
    parts = {"bert": str(bert), "tokenizer": str(plain)}
    with pytest.raises(CheckpointError, match=r"has no VAE: .*; --vae names an autoencoder"):
        open_checkpoint(Source(str(file), **parts))
    opened = open_checkpoint(Source(str(file), vae=str(plain), **parts))
    assert opened.folders["vae"] == plain / "vae"


FIRST, LAST = (f"model.diffusion_model.{name}.weight" for name in ("input_blocks.0.0", "out.2"))


def of_a_refiner(tensors: dict) -> dict:
    former = "cond_stage_model.transformer."
    return {k.replace(former, "conditioner.embedders.0.model."): v for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (of_a_refiner, "odd.safetensors is SDXL's refiner, .* give the base checkpoint"),
        (lambda t: t | {FIRST: torch.ones(16, 9, 3, 3)}, "with 9 channels in and 4 out: only"),
        (lambda t: t | {"edm_mean": torch.ones(4)}, "odd.safetensors is of a UNet .* noise of EDM"),
        (lambda t: t | {"control_model.a": torch.ones(1)}, "odd.safetensors holds a ControlNet"),
        (lambda t: {k: v for k, v in t.items() if k != LAST}, r"odd\.safetensors lacks out\.2\."),
        (
            lambda t: t,
            r"odd\.safetensors: vae/config\.json: block_out_channels=\[8, 8, 16\] is inv",
        ),
    ],
)
def test_a_single_file_that_is_not_served_is_named(plain, bert, tmp_path, changed, message):
    file = write_single_file(plain, tmp_path / "odd.safetensors")
    save_file(changed(load_file(file)), file)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(Source(str(file), bert=str(bert), tokenizer=str(plain)))


def test_a_linked_folder_has_the_name_of_the_link(plain, bert, tmp_path):
    link = tmp_path / "my-turbo"
    link.symlink_to(plain)
    assert open_checkpoint(link, bert).name == "my-turbo"


def test_a_part_is_no_checkpoint_and_says_where_it_is(plain):
    with pytest.raises(CheckpointError, match=f"not diffusers layout; {plain} has one, give that"):
        open_checkpoint(plain / "unet")


def test_a_lora_is_no_checkpoint(plain, bert, tmp_path):
    file = tmp_path / "style.safetensors"
    save_file({"lora_unet_down.lora_up.weight": torch.ones(2, 2)}, file)
    source = Source(str(file), bert=str(bert), tokenizer=str(plain / "tokenizer"))
    with pytest.raises(CheckpointError, match=r"style\.safetensors is a LoRA"):
        open_checkpoint(source)


def test_a_vae_of_elsewhere_decodes(plain, bert, tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16), decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), scaling_factor=0.7,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "taesd")
    opened = open_checkpoint(Source(str(plain), bert=str(bert), vae=str(tmp_path / "taesd")))
    decoder = load_parts(opened)["vqgan_decoder"]
    latent = decoder.example(2, 1)["latent"]
    with torch.no_grad():
        torch.testing.assert_close(decoder.module(latent), vae.decode(latent / 0.7).sample)
    assert scale_factor(opened) == 4


def original_names(tensors: dict) -> dict:
    named = {vae_name(name): tensor for name, tensor in tensors.items()}
    return {name: as_convolution(name, tensor).contiguous() for name, tensor in named.items()}


STYLES = {
    "diffusers": lambda tensors: tensors,
    "original": original_names,
    "decoder": lambda tensors: {
        k: v for k, v in tensors.items() if k.startswith(("decoder.", "post_quant_conv."))
    },
    "checkpoint": lambda tensors: {
        f"first_stage_model.{k}": v for k, v in original_names(tensors).items()
    } | {"model.diffusion_model.out.2.bias": torch.ones(4), "cond.weight": torch.ones(1)},
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_the_file_of_a_vae_decodes_as_its_folder(plain, bert, tmp_path, style):
    torch.manual_seed(3)
    vae_of_32_groups(tmp_path / "vae")
    change(tmp_path / "vae" / "config.json", scaling_factor=0.5, shift_factor=0.25)
    file = tmp_path / "vae-ft.safetensors"
    save_file(STYLES[style](load_file(weights_of(tmp_path / "vae"))), file)
    source = Path(shutil.copytree(plain, tmp_path / "source"))
    change(source / "vae" / "config.json", scaling_factor=0.5, shift_factor=0.25)
    opened = open_checkpoint(Source(str(source), vae=str(file), bert=str(bert)))
    assert opened.guesses == ["scaling_factor 0.5 of vae-ft.safetensors, as of the checkpoint's"
                              " own VAE"]  # fmt: skip
    whole = open_checkpoint(Source(str(source), vae=str(tmp_path / "vae"), bert=str(bert)))
    ours, theirs = (load_part(c, "vqgan_decoder", load_outlines(c)) for c in (opened, whole))
    latent = ours.example(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(ours.module(**latent), theirs.module(**latent))
    assert scale_factor(opened) == scale_factor(whole) == 4


def test_a_configuration_beside_the_file_of_a_vae_is_its_own(plain, bert, tmp_path):
    vae_of_32_groups(tmp_path / "vae")
    change(tmp_path / "vae" / "config.json", scaling_factor=0.3)
    file = weights_of(tmp_path / "vae")
    opened = open_checkpoint(Source(str(plain), vae=str(file), bert=str(bert)))
    assert (opened.config("vae")["scaling_factor"], opened.guesses) == (0.3, [])


def test_a_single_file_takes_the_vae_of_another(plain, bert, tmp_path):
    folder = twin(tmp_path / "folder")
    file = write_single_file(folder, tmp_path / "one.safetensors")
    vae = tmp_path / "vae.safetensors"
    shutil.copy(weights_of(folder / "vae"), vae)
    source = Source(str(file), vae=str(vae), bert=str(bert), tokenizer=str(folder))
    opened = open_checkpoint(source)
    assert opened.config("vae")["scaling_factor"] == 0.18215
    change_tensor(folder, "vae", "decoder.conv_in.bias", lambda t: t * float("nan"))
    shutil.copy(weights_of(folder / "vae"), vae)
    opened = open_checkpoint(source)
    with pytest.raises(CheckpointError) as caught, opened.naming_its_file():
        check_values(opened, ["vae"])
    assert str(caught.value).startswith(f"{vae}: vae has numbers in decoder.conv_in.bias")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"decoder.layers.0.weight": torch.ones(1)}, "is no AutoencoderKL, the only class"),
        ({"lora_unet_x.alpha": torch.ones(1)}, r"give the folder of another class"),
        ({"decoder.up_blocks.0.resnets.0.conv1.weight": torch.ones(8, 8, 3, 3)},
         r"lacks decoder\.conv_out\.weight: download it again"),
        ({"decoder.up.0.block.0.conv1.weight": torch.ones(8, 8, 3, 3)}, r"odd\.safetensors"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_vae_is_refused(plain, bert, tmp_path, tensors, message):
    file = tmp_path / "odd.safetensors"
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(Source(str(plain), vae=str(file), bert=str(bert)))
    assert str(file) in str(caught.value)


def test_what_the_unet_predicts_can_be_set(plain, bert):
    for prediction in ("v_prediction", "epsilon"):
        serving = Serving(prediction_type=prediction)
        opened = open_checkpoint(plain, bert, serving=serving)
        assert opened.config("scheduler")["prediction_type"] == prediction
    with pytest.raises(CheckpointError, match="--prediction-type v is invalid: must be one of ep"):
        open_checkpoint(plain, bert, serving=Serving(prediction_type="v"))


def test_a_file_of_2_x_is_taken_to_predict_v_unless_it_is_set(bert, tmp_path):
    """Its configurations say no more than its tensors; the side of its pictures follows."""
    folder = twin(tmp_path / "folder")
    file = write_single_file(folder, tmp_path / "two.safetensors")
    as_2_x(folder, file)
    guesses = {}
    for given in (None, "epsilon", "v_prediction"):
        source = Source(str(file), tokenizer=str(folder), bert=str(bert))
        opened = open_checkpoint(source, serving=Serving(prediction_type=given))
        config = opened.config("scheduler")["prediction_type"], opened.config("unet")["sample_size"]
        guesses[given] = (*config, len(opened.guesses))
    assert guesses == {
        None: ("v_prediction", 96, 1), "epsilon": ("epsilon", 64, 0),
        "v_prediction": ("v_prediction", 96, 0),
    }  # fmt: skip


def test_autoencoders_of_16_channels_and_of_normalised_latents_decode(copied, bert):
    torch.manual_seed(0)
    mean, std = [0.1 * k for k in range(16)], [1 + 0.1 * k for k in range(16)]
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), norm_num_groups=4, latent_channels=16,
        latents_mean=mean, latents_std=std,
    )  # fmt: skip
    vae.save_pretrained(copied / "vae")
    unet = UNet2DConditionModel.from_config(
        UNet2DConditionModel.load_config(copied / "unet") | {"in_channels": 16, "out_channels": 16}
    )
    unet.save_pretrained(copied / "unet")
    decoder = load_parts(open_checkpoint(copied, bert))["vqgan_decoder"]
    latent = decoder.example(2, 1)["latent"]
    raw = latent * torch.tensor(std).view(1, 16, 1, 1) / 0.18215
    raw = raw + torch.tensor(mean).view(1, 16, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(
            decoder.module(latent), vae.decode(raw).sample, rtol=1e-4, atol=1e-4
        )


def test_pictures_need_not_be_square(copied, bert, tmp_path):
    change(copied / "unet" / "config.json", sample_size=[8, 12])
    opened = open_checkpoint(copied, bert)
    parts = load_parts(opened)
    assert native_rows(parts["unet"], 1)["sample"].shape == (1, 4, 8, 12)
    write(opened, parts, tmp_path)
    config = PipelineConfig.load(tmp_path / "pipeline.json")
    assert (config.native_width, config.native_height, config.native_side) == (48, 32, 48)


def test_a_unet_without_a_size_takes_that_of_its_autoencoder(copied, bert):
    change(copied / "unet" / "config.json", sample_size=None)
    change(copied / "vae" / "config.json", sample_size=[32, 64])
    assert native_size(open_checkpoint(copied, bert)) == (8, 16)
    config = json.loads((copied / "vae" / "config.json").read_text())
    del config["sample_size"]
    (copied / "vae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"unet/config\.json has no sample_size: add"):
        open_checkpoint(copied, bert)


def test_a_side_that_former_files_name_too_small_is_that_of_diffusers(copied, bert):
    file = copied / "unet" / "config.json"
    for version, side in (("0.8.1", 64), ("0.2.2", 64), ("0.9.0", 8), ("0.42.1", 8)):
        change(file, _diffusers_version=version)
        assert native_size(open_checkpoint(copied, bert)) == (side, side)


def test_former_names_of_bert_are_read_and_those_of_clip_left_alone(tiny, tmp_path):
    former = Path(shutil.copytree(tiny, tmp_path / "former"))
    (former / "bert").rename(former / "text_encoder_2")
    (former / "bert_tokenizer").rename(former / "tokenizer_2")
    index = json.loads((former / "model_index.json").read_text())
    index["text_encoder_2"], index["tokenizer_2"] = index.pop("bert"), index.pop("bert_tokenizer")
    index["fusion"] = ["export.fusion_head", "FusionHead"]
    (former / "model_index.json").write_text(json.dumps(index))
    opened = open_checkpoint(former)
    assert opened.folders["bert"].name == "text_encoder_2"
    assert opened.classes["fusion"] == "FusionHead"
    index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
    index["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
    (former / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks its part bert/; --bert names"):
        open_checkpoint(former)  # its fusion head was trained with one


def lfs_weights(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    weights_of(folder / "text_encoder").write_text(pointer)


def lfs_tokenizer(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    (folder / "tokenizer" / "tokenizer.json").write_text(pointer)


def cut(folder: Path) -> None:
    file = weights_of(folder / "unet")
    file.write_bytes(file.read_bytes()[:-10])


def pickle(folder: Path) -> None:
    file = weights_of(folder / "vae")
    file.rename(file.with_name("diffusion_pytorch_model.bin"))


def disguised_pickle(folder: Path) -> None:
    torch.save({"a": torch.ones(1)}, weights_of(folder / "unet"))


def no_weights(folder: Path) -> None:
    weights_of(folder / "unet").unlink()


def sentencepiece_only(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(b"x")


def loud_suffix(folder: Path) -> None:
    file = weights_of(folder / "unet")
    file.rename(file.with_suffix(".SAFETENSORS"))


def one_level_deeper(folder: Path) -> None:
    """As the hub's cache keeps a checkpoint."""
    names = [path.name for path in folder.iterdir()]
    inner = folder / "snapshots" / "c0ffee"
    inner.mkdir(parents=True)
    for name in names:
        (folder / name).rename(inner / name)


def a_file_in_a_folder(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    (folder / "Style.safetensors").write_bytes(b"")


def reshape(folder: Path) -> None:
    change_tensor(folder, "unet", "conv_in.weight", lambda tensor: tensor[:, :2])


def lacking(folder: Path) -> None:
    tensors = load_file(weights_of(folder / "unet"))
    del tensors["conv_in.weight"], tensors["conv_out.bias"]
    save_file(tensors, weights_of(folder / "unet"), {"format": "pt"})


def whole_numbers(folder: Path) -> None:
    change_tensor(folder, "vae", "decoder.conv_in.bias", torch.Tensor.int)


def change_tensor(folder: Path, part: str, name: str, changed) -> None:
    tensors = load_file(weights_of(folder / part))
    tensors[name] = changed(tensors[name]).contiguous()
    save_file(tensors, weights_of(folder / part), {"format": "pt"})


def empty_tokenizer(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").write_text("")


def list_for_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer_config.json").write_text("[1]")


def nested(folder: Path) -> None:
    (folder / "vae" / "config.json").write_text('{"a":' * 9000)


def index_of(**fields: object):
    return lambda folder: change(folder / "model_index.json", **fields)


def config_of(part: str, **fields: object):
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    return lambda folder: change(folder / part / name, **fields)


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (lfs_weights, r"model\.safetensors is a Git LFS pointer.*: run `git lfs pull`"),
        (lfs_tokenizer, r"tokenizer\.json is a Git LFS pointer"),
        (cut, r"unet/\S+ is cut short: it has \d+ bytes of \d+: download it again"),
        (pickle, r"vae has no safetensors; diffusion_pytorch_model\.bin is a pickle"),
        (disguised_pickle, "is a pickle under another name"),
        (no_weights, "unet has no safetensors: its weights are missing"),
        (loud_suffix, r"known name but \S+\.SAFETENSORS: rename it model\.safetensors"),
        (one_level_deeper, r"no model_index\.json: .*; \S+/c0ffee has one, give that folder"),
        (a_file_in_a_folder, r"; a single file is given by its name, as \S+/Style\.safetensors"),
        (sentencepiece_only, r"has only spiece\.model, which needs sentencepiece"),
        (index_of(_class_name="StableDiffusionControlNetPipeline"), "ControlNet.* is not served"),
        (index_of(_class_name="PixArtAlphaPipeline"), "PixArtAlphaPipeline', which is not served"),
        (index_of(_class_name="StableDiffusionInpaintPipeline"), "Inpaint.*is not served"),
        (index_of(_class_name="StableDiffusionXLPipeline"), "lacks its part text_encoder_2/"),
        (index_of(unet=[None, None]), "lacks its part unet/"),
        (index_of(unet="UNet"), "has unet 'UNet', which is not allowed"),
        (index_of(defaults=[1]), r"has defaults \[1\], which is not allowed"),
        (config_of("vae", scaling_factor=None), "vae/config.json: scaling_factor=None is invalid"),
        (config_of("scheduler", beta_start=float("nan")), "beta_start is NaN, which is no number"),
        (config_of("scheduler", beta_start=2.0), "beta_start=2.0 .* a number between 0 and 1"),
        (config_of("unet", sample_size=-1), "unet/config.json: sample_size=-1 is invalid"),
        (config_of("unet", sample_size=[8, 7]), "latent sides must be multiples of 2"),
        (config_of("unet", in_channels=9), "unet has in_channels 9 and out_channels 4"),
        (reshape, r"unet/\S+: conv_in\.weight has shape \[\d+, 2, 3, 3\], config\.json needs \["),
        (lacking, r"unet lacks 2 of its tensors, conv_in\.weight first: download it again"),
        (whole_numbers, r"vae/\S+: decoder\.conv_in\.bias has type I32, which is not read"),
        (empty_tokenizer, r"tokenizer/tokenizer\.json is empty: download it again"),
        (list_for_a_tokenizer, r"tokenizer/tokenizer_config\.json is not a JSON object"),
        (nested, r"vae/config\.json is not JSON: it is nested too deeply"),
        (
            config_of("unet", layers_per_block=10**9),
            "layers_per_block=1000000000 .* at most 512",
        ),
        (config_of("vae", block_out_channels=[10**9]), "block_out_channels=1000000000 is invalid"),
        (config_of("vae", out_channels=1), r"vae/config\.json: out_channels=1 .* must be 3, red"),
        (config_of("text_encoder", num_hidden_layers=None), "num_hidden_layers=None is invalid"),
        (config_of("text_encoder", use_attention_mask=True), "use_attention_mask=true is not se"),
        (index_of(latent_to_rgb="words"), "latent_to_rgb in model_index.json must be 37 rows"),
        (index_of(scheduler=[None, None]), "lacks its part scheduler/"),
    ],
)
def test_one_sentence_names_file_and_remedy(copied, bert, monkeypatch, breaking, message):
    breaking(copied)
    reads = []
    monkeypatch.setattr("export.checkpoint.load_part", lambda *given, **named: reads.append(given))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(copied, bert)
    assert "\n" not in str(caught.value)
    assert not reads


def test_weights_that_are_not_finite_name_their_tensor(copied, bert):
    change_tensor(copied, "unet", "conv_in.bias", lambda tensor: tensor * float("nan"))
    with pytest.raises(CheckpointError, match=r"unet has numbers in conv_in\.bias that are not"):
        load_parts(open_checkpoint(copied, bert))


def test_a_tokenizer_of_another_text_encoder_is_refused(copied, bert):
    file = copied / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["zz"] = 5000
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="tokenizer gives 'zz' the id 5000, text_encoder has"):
        open_checkpoint(copied, bert)


@pytest.mark.parametrize("kept", [48894, 30000])
def test_merges_of_clips_own_vocabulary_are_all_there(tmp_path, kept):
    """A text file that is cut at the end of a line is still one."""
    source = write_family(tmp_path / "sd", shallow(FAMILIES["stabilityai/sd-turbo"]))
    change(source / "text_encoder" / "config.json", vocab_size=49408)
    letters = sorted(ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters][:48894]
    tokens = [*letters, *(f"{a}</w>" for a in letters), *(a + b for a, b in pairs), START, END]
    ids = {token: number for number, token in enumerate(tokens)}
    (source / "tokenizer" / "vocab.json").write_text(json.dumps(ids))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs[:kept])]
    (source / "tokenizer" / "merges.txt").write_text("\n".join(lines))
    cut_short = r"merges\.txt is cut short: it has 30000 merges of 48894: download it again"
    message = cut_short if kept < 48894 else "text_encoder/.* has shape"
    with pytest.raises(CheckpointError, match=message):  # its weights are of another vocabulary
        open_checkpoint(source)


@pytest.mark.parametrize("name", ["model.ckpt", "weights.bin", "old.pt"])
def test_an_existing_pickle_is_not_called_absent(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is a pickle, which can run code and is not read"):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("./mine", True), ("../mine", True), ("~/mine", True), ("/a", True), ("a/b/c", True),
        ("model.safetensors", True), ("org/model.ckpt", True), ("tests/nothing", True),
        ("org/model", False), ("runwayml/stable-diffusion-v1.5", False), ("gpt2", False),
    ],
)  # fmt: skip
def test_a_path_is_never_a_hub_id(text, local):
    assert looks_like_path(text) == local


@pytest.mark.parametrize("option", ["vae", "tokenizer", "bert"])
def test_a_mistyped_part_names_its_option(plain, option):
    with pytest.raises(CheckpointError, match=f"--{option} /no/such is not there"):
        open_checkpoint(Source(str(plain), **{option: "/no/such"}))


def test_a_mistyped_path_is_not_sent_to_the_hub(monkeypatch):
    called = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: called.append(a))
    with pytest.raises(CheckpointError, match="is an address: give the hub id alone, as some/m"):
        open_checkpoint("https://huggingface.co/some/model/tree/main")
    with pytest.raises(CheckpointError, match="is an address: download its file and give that"):
        open_checkpoint("https://civitai.com/models/123")
    for text in ("./mine", "checkpoints/scenes-46", "one.safetensors", "a/b/c"):
        with pytest.raises(CheckpointError, match="is not there"):
            open_checkpoint(text)
    assert not called


class Hub:
    """Stands for the hub: a folder that gives the files which are asked for, and counts them."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.cache, self.sent = folder, cache / "c0ffee", []
        self.names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]

    def list_repo_files(self, repository: str, revision: str) -> list[str]:
        assert revision == "c0ffee"
        return self.names

    def snapshot_download(self, repository: str, revision: str, allow_patterns: list[str]) -> str:
        for name in self.names:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.folder / name, self.cache / name)
                self.sent.append(name)
        return str(self.cache)


@pytest.fixture
def hub(copied, tmp_path, monkeypatch) -> Hub:
    hub = Hub(copied, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    return hub


def test_only_the_weights_that_are_read_are_downloaded(copied, bert, hub):
    unet = weights_of(copied / "unet")
    shutil.copy(unet, unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    (copied / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    hub.__init__(copied, hub.cache.parent)
    opened = open_checkpoint(Source("some/checkpoint", revision="main", bert=str(bert)))
    assert opened.revisions == {"some/checkpoint": "c0ffee"}
    weights = [name for name in hub.sent if not name.endswith((".json", ".txt"))]
    assert sorted(weights) == [
        "text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


def test_a_configuration_is_refused_before_weights_are_downloaded(copied, bert, hub):
    change(copied / "unet" / "config.json", in_channels=9)
    with pytest.raises(CheckpointError, match="in_channels 9"):
        open_checkpoint(Source("some/checkpoint", bert=str(bert)))
    assert hub.sent
    assert not [name for name in hub.sent if name.endswith(".safetensors")]


CONFIGS = (
    "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
    "bert/config.json", "fusion/config.json", "scheduler/scheduler_config.json",
)  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_no_configuration_ends_in_a_traceback(tiny, tmp_path, name):
    """Fields take wrong values in turn; the checkpoint opens or is refused by name."""
    folder = Path(shutil.copytree(tiny, tmp_path / "fuzzed"))
    file = folder / name
    good = json.loads(file.read_text())
    refused = 0
    others = ([], "words", -1, {}, True)
    for place, field in enumerate(good):
        for wrong in (None, float("nan"), others[place % len(others)]):
            file.write_text(json.dumps(good | {field: wrong}))
            text = refusal(folder)
            assert "\n" not in text, (field, wrong)
            refused += bool(text)
    assert refused >= len(good)  # NaN is never right


XL_CONFIGS = ("unet/config.json", "vae/config.json", "text_encoder_2/config.json")


def test_fields_of_a_wrong_kind_are_refused_by_name(tmp_path):
    """The networks of SDXL; libraries take most of these without a word."""
    family = shallow(FAMILIES["stabilityai/stable-diffusion-xl-base-1.0"])
    folder = write_family(tmp_path / "xl", family)
    for name in XL_CONFIGS:
        file = folder / name
        good = json.loads(file.read_text())
        silent = []
        for field, value in good.items():
            for wrong in ({"a": 1}, -1):
                file.write_text(json.dumps(good | {field: wrong}))
                text = refusal(folder)
                assert "\n" not in text, (field, wrong)
                if type(value) in (bool, int, float, list) and field not in text:
                    silent.append((field, wrong))
        file.write_text(json.dumps(good))
        allowed = {"sample_size", "shift_factor", "dropout", "attention_dropout", "architectures"}
        assert {f for f, _ in silent if not f.endswith("_id")} <= allowed
        assert refusal(folder) == ""


def refusal(folder: Path) -> str:
    """Why a checkpoint is refused; empty where it opens. Other errors are the test's."""
    try:
        open_checkpoint(folder)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_single_file_of_another_family_is_named_before_it_is_read(plain, tmp_path, monkeypatch):
    file = write_single_file(plain, tmp_path / "xl.safetensors")
    tensors = {
        name.replace("cond_stage_model.", "conditioner.embedders.0."): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file)
    monkeypatch.setattr(layout, "PIPELINES", ("StableDiffusionPipeline",))
    source = Source(str(file), tokenizer=str(plain / "tokenizer"))
    with pytest.raises(CheckpointError, match="StableDiffusionXLPipeline, which is not served"):
        open_checkpoint(source)


TWO_LEVELS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (32, 64),
    "attention_head_dim": (1, 1), "transformer_layers_per_block": (1, 2),
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 24 + 6 * 256,
    "norm_num_groups": 32,
}  # fmt: skip


def test_a_single_file_of_sdxl_has_the_parts_of_its_folder(tmp_path):
    family = Family(XL_UNET | TWO_LEVELS, EULER, xl=True, layers=1)
    folder = write_family(tmp_path / "xl", family)
    vae_of_32_groups(folder / "vae")
    file = write_xl_single_file(folder, tmp_path / "xl.safetensors")
    opened = open_checkpoint(Source(str(file), tokenizer=str(folder)))
    assert opened.folders["tokenizer_2"] != opened.folders["tokenizer"]
    whole = open_checkpoint(folder)
    for part, model_class in (
        ("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel),
        ("text_encoder_2", CLIPTextModelWithProjection),
    ):  # fmt: skip
        ours, theirs = (c.load(part, model_class).state_dict() for c in (opened, whole))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), (part, name)
    tower = opened.config("text_encoder_2")  # its pooled text is that of the end mark
    assert tower["eos_token_id"] == tower["vocab_size"] - 1
    fields = ("block_out_channels", "down_block_types", "up_block_types", "cross_attention_dim",
              "projection_class_embeddings_input_dim", "use_linear_projection")  # fmt: skip
    given, made = whole.config("unet"), opened.config("unet")
    assert {name: made[name] for name in fields} == {name: given[name] for name in fields}
    bare = open_checkpoint(Source(str(file), tokenizer=str(folder / "tokenizer")))
    assert bare.folders["tokenizer_2"] == bare.folders["tokenizer"]


# As SSD-1B leaves transformers out, and with them the middle's; as BK-SDM, the middle.
DISTILLED = {
    "ssd-1b": {
        "transformer_layers_per_block": ((1,), (2,)), "mid_block_type": "UNetMidBlock2D",
        "reverse_transformer_layers_per_block": ((2, 3), (1, 1)),
    },
    "bk-sdm": {"mid_block_type": None},
}  # fmt: skip


@pytest.mark.parametrize("name", DISTILLED)
def test_a_single_file_tells_what_its_unet_lacks(tmp_path, name):
    family = Family(XL_UNET | TWO_LEVELS | DISTILLED[name], EULER, xl=True, layers=1)
    folder = write_family(tmp_path / "xl", family)
    file = write_xl_single_file(folder, tmp_path / "xl.safetensors")
    unpack(file, tmp_path / "parts", ["StableDiffusionXLPipeline"])
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(tmp_path / "parts" / "unet")
        )
    ours, theirs = (load_file(weights_of(place / "unet")) for place in (tmp_path / "parts", folder))
    assert unet.state_dict().keys() == ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
