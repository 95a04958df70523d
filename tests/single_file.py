"""Writes a tiny checkpoint as one file with the tensor names of the original Stable Diffusion."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
TOP = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.", "self_attn.": "attn.", "layer_norm1": "ln_1",
    "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "final_layer_norm": "ln_final", "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write_single_file(checkpoint: Path, file: Path, metadata: dict[str, str] | None = None) -> Path:
    """Puts UNet, text encoder and VAE of a folder into one file."""
    tensors = {}
    for part, prefix, rename in (
        ("unet", "model.diffusion_model.", unet_name),
        ("vae", "first_stage_model.", vae_name),
        ("text_encoder", "cond_stage_model.transformer.", clip_name),
    ):
        (weights,) = (checkpoint / part).glob("*.safetensors")
        for name, tensor in load_file(weights).items():
            new = rename(name)
            tensors[prefix + new] = as_convolution(new, tensor).contiguous()
    save_file(tensors, file, metadata)
    return file


def as_2_x(checkpoint: Path, file: Path) -> None:
    """Gives a single file the text tower of Stable Diffusion 2.x, whose names are OpenCLIP's."""
    tower = open_clip(weights_of(checkpoint / "text_encoder"))
    others = {k: v for k, v in load_file(file).items() if not k.startswith("cond_stage_model.")}
    save_file(others | {f"cond_stage_model.model.{k}": v for k, v in tower.items()}, file)


def write_xl_single_file(checkpoint: Path, file: Path) -> Path:
    """SDXL's parts in one file; its second level alone has attention."""
    tensors = {}
    for part, prefix, rename in (
        ("unet", "model.diffusion_model.", lambda name: unet_name(name, attention=1)),
        ("vae", "first_stage_model.", vae_name),
        ("text_encoder", "conditioner.embedders.0.transformer.", clip_name),
    ):
        for name, tensor in weights_of(checkpoint / part).items():
            new = rename(name)
            tensors[prefix + new] = as_convolution(new, tensor).contiguous()
    second = open_clip(weights_of(checkpoint / "text_encoder_2"))
    prefix = "conditioner.embedders.1.model."
    save_file(tensors | {prefix + name: tensor for name, tensor in second.items()}, file)
    return file


def weights_of(folder: Path) -> dict[str, Tensor]:
    (weights,) = folder.glob("*.safetensors")
    return load_file(weights)


def open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tower under OpenCLIP's names; query, key and value are one tensor there."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        short = name.removeprefix("text_model.")
        if ".self_attn." in short and ".out_proj." not in short:
            continue
        for ours, theirs in OPEN_CLIP.items():
            short = short.replace(ours, theirs)
        tensors[short] = tensor.contiguous()
    if "text_projection.weight" in tensors:
        tensors["text_projection"] = tensors.pop("text_projection.weight").T.contiguous()
    for name in [name for name in weights if ".q_proj." in name]:
        joined = torch.cat([weights[name.replace(".q_", f".{kind}_")] for kind in "qkv"])
        layer, kind = name.split("layers.")[1].split(".")[0], name.rpartition(".")[2]
        tensors[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = joined
    return tensors


def clip_name(name: str) -> str:
    return name if name.startswith("text_model.") else f"text_model.{name}"


def as_convolution(name: str, tensor: Tensor) -> Tensor:
    """The original VAE has convolutions of one pixel where diffusers has linear layers."""
    projection = ".attn_1." in name and tensor.ndim == 2
    return tensor[..., None, None] if projection else tensor


def unet_name(name: str, layers: int = 1, levels: int = 2, attention: int = 0) -> str:
    """For a UNet of one layer a block, one level of which has attention."""
    for ours, theirs in TOP.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    kind, *rest = name.split(".")
    if kind == "mid_block":
        place = "1" if rest[0] == "attentions" else str(2 * int(rest[1]))
        return f"middle_block.{place}." + inner(rest)
    level, rest = int(rest[0]), rest[1:]
    if rest[0] == "downsamplers":
        return f"input_blocks.{(layers + 1) * (level + 1)}.0.op.{rest[-1]}"
    if rest[0] == "upsamplers":
        with_attention = level == levels - 1 - attention
        place = 2 if with_attention else 1
        return f"output_blocks.{(layers + 1) * level + layers}.{place}.conv.{rest[-1]}"
    within = 0 if rest[0] == "resnets" else 1
    number = (layers + 1) * level + int(rest[1])
    if kind == "down_blocks":
        return f"input_blocks.{number + 1}.{within}." + inner(rest)
    return f"output_blocks.{number}.{within}." + inner(rest)


def inner(rest: list[str]) -> str:
    """Names inside `resnets.0` or `attentions.0`."""
    if rest[0] == "resnets":
        return ".".join([RESNET[rest[2]], *rest[3:]])
    return ".".join(rest[2:])


def vae_name(name: str, levels: int = 3) -> str:
    side, *rest = name.split(".")
    if side in ("quant_conv", "post_quant_conv"):
        return name
    if rest[0] == "mid_block":
        if rest[1] == "resnets":
            return f"{side}.mid.block_{int(rest[2]) + 1}." + vae_inner(rest[3:])
        tail = ".".join(rest[3:])
        for ours, theirs in ATTENTION.items():
            if tail.startswith(f"{ours}."):
                return f"{side}.mid.attn_1.{theirs}{tail.removeprefix(ours)}"
    if rest[0] in ("down_blocks", "up_blocks"):
        down = rest[0] == "down_blocks"
        level = int(rest[1]) if down else levels - 1 - int(rest[1])
        block = f"{side}.{'down' if down else 'up'}.{level}"
        if rest[2] == "resnets":
            return f"{block}.block.{rest[3]}." + vae_inner(rest[4:])
        return f"{block}.{'downsample' if down else 'upsample'}.{'.'.join(rest[4:])}"
    return f"{side}." + ".".join(rest).replace("conv_norm_out", "norm_out")


def vae_inner(rest: list[str]) -> str:
    return ".".join(rest).replace("conv_shortcut", "nin_shortcut")
