"""A single `.safetensors` file of an AutoencoderKL, as on Civitai, unpacked into a folder.

Its tensors have diffusers' names, or those of the original latent diffusion code, alone or in a
whole checkpoint. The shapes give the configuration; what latents are scaled by, they cannot tell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from export.weights import read_header, read_json
from networks.loading import CheckpointError, refusing

CLASS = "AutoencoderKL"
PREFIX = "first_stage_model."  # of the autoencoder in a whole checkpoint
# What shapes cannot tell; of the checkpoint's own autoencoder, where that is of the same class.
SETTINGS = (
    "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast", "sample_size",
)  # fmt: skip
SCALING, SCALING_XL = 0.18215, 0.13025  # of Stable Diffusion 1.x and 2.x, and of XL
USED = ("decoder.", "encoder.", "post_quant_conv.", "quant_conv.")
ORIGINAL, DIFFUSERS = "decoder.up.0.block.0.conv1.weight", "decoder.up_blocks.0.resnets.0."


def unpack_vae(file: Path, folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes configuration and weights of the autoencoder in `file` into `folder`.

    Args:
        file: in safetensors format; a `config.json` beside it goes before `settings`.
        folder: made here.
        settings: those of `SETTINGS` that are known.

    Raises:
        CheckpointError: it is no such autoencoder, or cannot be read.
    """
    header = read_header(file)
    names = {name.removeprefix(PREFIX) for name in header}
    if ORIGINAL not in names and not any(name.startswith(DIFFUSERS) for name in names):
        raise CheckpointError(
            f"--vae {file} is no {CLASS}, the only class that is read from one file: it has neither"
            f" {ORIGINAL} nor {DIFFUSERS}*; give the folder of another class"
        )
    with refusing(file), safe_open(file, "pt") as stored:
        own = {
            short: stored.get_tensor(name)
            for name in header
            if (short := name.removeprefix(PREFIX)).startswith(USED)
        }
        try:
            weights = _converted(own) if ORIGINAL in names else own
            config = _config(weights)
        except KeyError as error:
            raise CheckpointError(f"{file} lacks {error.args[0]}: download it again") from error
    beside = file.with_name("config.json")
    if beside.is_file() and (given := read_json(beside)).get("_class_name") == CLASS:
        settings = given
    config |= {name: settings[name] for name in SETTINGS if name in settings}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def _converted(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original tensors under diffusers' names."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    levels = _count(own, "decoder.up.{}.block.0.conv1.weight")
    types = {"down_block_types": ["DownEncoderBlock2D"] * levels,
             "up_block_types": ["UpDecoderBlock2D"] * levels}  # fmt: skip
    return convert_ldm_vae_checkpoint(dict(own), types)


def _config(own: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of tensors with diffusers' names."""
    first = "decoder.up_blocks.{}.resnets.0.conv1.weight"
    levels = _count(own, first)
    widths = [len(own[first.format(level)]) for level in reversed(range(levels))]
    layers = _count(own, "decoder.up_blocks.0.resnets.{}.conv1.weight")
    return {
        "_class_name": CLASS,
        "in_channels": 3,
        "out_channels": len(own["decoder.conv_out.weight"]),
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": layers - 1,
        "latent_channels": own["decoder.conv_in.weight"].shape[1],
        "use_quant_conv": "quant_conv.weight" in own,
        "use_post_quant_conv": "post_quant_conv.weight" in own,
        "mid_block_add_attention": any(n.startswith("decoder.mid_block.attentions.") for n in own),
    }


def _count(own: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbers in a row, from 0, give the name of a tensor."""
    count = 0
    while pattern.format(count) in own:
        count += 1
    return count
