"""Checks that need the JSON files of a checkpoint alone.

Each network is built from its configuration without memory for weights, so that whatever a
library rejects is rejected before anything is read or downloaded. Knows no weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Mapping
from functools import lru_cache
from pathlib import Path
from types import NoneType
from typing import Any

import diffusers
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import CLIPTextConfig

from export.checkpoint import Checkpoint
from export.config_fields import ID, check_fields, shown
from export.tokenizer import check_vocabulary, load_tokenizer
from export.unet import check_inputs, check_width
from export.vqgan_decoder import UNUSED
from export.weights import WEIGHT_TYPES, read_header
from networks.fusion_head import FusionHead
from networks.loading import (
    CheckpointError,
    check_missing,
    first_line,
    not_finite,
    refusing,
)
from networks.pruned import pruning_of

MOST_LAYERS, LARGEST = 512, 2**20  # of a kind of layers; of any other whole number
END, TYPES = "eos_token_id", ("dtype", "torch_dtype")
FORMER_LAYERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Beginnings of the names of tensors without which a UNet or decoder gives another picture.
COMPUTING = (
    "down_blocks.", "mid_block.", "up_blocks.", "decoder.", "post_quant_conv.", "conv_",
    "time_embedding.", "add_embedding.", "class_embedding.", "encoder_hid_proj.",
)  # fmt: skip


def check_configs(checkpoint: Checkpoint) -> None:
    """Checks every configuration by itself and against its neighbours.

    Raises:
        CheckpointError: with part, field, value and what is allowed.
    """
    from export import pipeline

    for part in checkpoint.weights:
        for name, value in checkpoint.config(part).items():
            _check_size(checkpoint, part, name, value)
        if part not in ("bert", "fusion"):
            known = getattr(diffusers, checkpoint.classes[part], CLIPTextConfig)
            check_fields(_file(checkpoint, part), checkpoint.config(part), known)
    unet = checkpoint.config("unet")
    first = _check_tower(checkpoint, "text_encoder")
    width, pooled, sources = first.hidden_size, None, "text_encoder has hidden_size"
    if "text_encoder_2" in checkpoint.folders:
        second = _check_tower(checkpoint, "text_encoder_2")
        width, pooled = width + second.hidden_size, second.projection_dim
        sources = "text_encoder and text_encoder_2 have together"
        if first.max_position_embeddings != second.max_position_embeddings:
            raise CheckpointError(
                f"text_encoder has max_position_embeddings {first.max_position_embeddings},"
                f" text_encoder_2 has {second.max_position_embeddings}"
            )
    check_unet(checkpoint, unet, pooled)
    without_weights(checkpoint, "unet")
    if "bert" in checkpoint.folders:
        _check_fusion(checkpoint, width)
    check_width(unet, width, sources)
    check_vae(checkpoint, checkpoint.config("vae"))
    for source, part in pipeline.PART_OF_TOKENIZER.items():
        if source in checkpoint.folders:
            check_vocabulary(checkpoint, load_tokenizer(checkpoint, source), source, part)
    pipeline.check(checkpoint)


def check_weights(checkpoint: Checkpoint) -> None:
    """Checks the headers of all weight files, and their tensors against the configurations.

    Raises:
        CheckpointError: it names part, file and tensor.
    """
    for part, (_, files) in checkpoint.weights.items():
        headers = {name: read_header(checkpoint.folders[part] / name) for name in files}
        with refusing(checkpoint.folders[part]):
            pruned = pruning_of(checkpoint.folders[part])
        module = None if pruned else without_weights(checkpoint, part)
        if module is None:
            continue
        wanted = {_short(name): tuple(value.shape) for name, value in module.named_parameters()}
        present = {_of_today(_short(tensor)) for header in headers.values() for tensor in header}
        unused = UNUSED if part == "vae" else ()
        check_missing(checkpoint.folders[part], wanted.keys() - present, unused)
        if part in ("unet", "vae"):  # text encoders may be read up to an earlier layer
            strange = [n for n in present - wanted.keys() if n.startswith(COMPUTING)]
            if strange:
                text = f"{checkpoint.folders[part]} has {min(strange)}, which its config.json"
                raise CheckpointError(f"{text} has no place for: they are of different checkpoints")
        for name, header in headers.items():
            file = checkpoint.folders[part] / name
            for tensor, entry in header.items():
                _check_tensor(file, tensor, entry, wanted.get(_of_today(_short(tensor))))


def check_values(checkpoint: Checkpoint, parts: Container[str]) -> None:
    """Checks the weights of `parts` before any is converted.

    Raises:
        CheckpointError: numbers are not finite; it names part and tensor.
    """
    for part, (_, files) in checkpoint.weights.items():
        folder = checkpoint.folders[part]
        if part not in parts:
            continue
        for name in files:
            with refusing(folder / name), safe_open(folder / name, "pt") as stored:
                for key in stored.keys():  # noqa: SIM118  (no mapping)
                    if not torch.isfinite(stored.get_tensor(key)).all():
                        raise not_finite(folder, key)


def _short(name: str) -> str:
    """A tensor's name as every version of transformers has it."""
    return name.removeprefix("text_model.")


def _of_today(name: str) -> str:
    """A tensor's name where that of its layer is of diffusers' former attention."""
    layer, _, kind = name.rpartition(".")
    owner, _, last = layer.rpartition(".")
    return f"{owner}.{FORMER_LAYERS[last]}.{kind}" if last in FORMER_LAYERS else name


def _check_tensor(file: Path, name: str, entry: Any, wanted: tuple[int, ...] | None) -> None:
    if wanted is None:
        return
    shape = tuple(entry["shape"])
    if shape != wanted:
        text = f"{file}: {name} has shape {list(shape)}, config.json needs {list(wanted)}"
        raise CheckpointError(f"{text}: they are of different checkpoints")
    if entry["dtype"] not in WEIGHT_TYPES:
        text = f"{file}: {name} has type {entry['dtype']}, which is not read"
        raise CheckpointError(f"{text}: {', '.join(WEIGHT_TYPES)} are")


def _check_size(checkpoint: Checkpoint, part: str, name: str, value: Any) -> None:
    """Refuses numbers with which a network would take hours to build, or all memory."""
    if isinstance(value, list):
        for item in value:
            _check_size(checkpoint, part, name, item)
    elif isinstance(value, int):
        most = MOST_LAYERS if "layer" in name else LARGEST
        if value > most:
            file = checkpoint.folders[part] / "config.json"
            raise CheckpointError(f"{file}: {name}={value} is invalid: must be at most {most}")


def without_weights(checkpoint: Checkpoint, part: str) -> nn.Module | None:
    """A part without memory for its weights, to look at; None of the text model and fusion head."""
    if part not in checkpoint.folders or part in ("bert", "fusion"):
        return None
    config, name = checkpoint.config(part), checkpoint.classes[part]
    try:
        return _build(checkpoint, part, lambda: _network(name, json.dumps(config)))
    except CheckpointError as error:
        reason = first_line(error.__cause__)
        field = _blamed(name, config, reason)
        if field is None:
            raise
        wrong = f"{_file(checkpoint, part)}: {field}={shown(config[field])} is invalid"
        raise CheckpointError(f"{wrong}: {reason}") from error


def _blamed(class_name: str, config: dict[str, Any], reason: str) -> str | None:
    """The field without which a network can be built, else one without which it fails elsewhere."""
    suspect = None
    for field in sorted(config, key=lambda name: config[name] is not None):  # nulls first
        rest = json.dumps({key: other for key, other in config.items() if key != field})
        try:
            with torch.device("meta"):
                _network(class_name, rest)
            return field
        except Exception as error:
            if suspect is None and first_line(error) != reason:
                suspect = field
    return suspect


def _file(checkpoint: Checkpoint, part: str) -> Path:
    return checkpoint.folders[part] / "config.json"


@lru_cache(maxsize=8)
def _network(class_name: str, config: str) -> nn.Module:
    """A network of diffusers or CLIP, of a configuration in JSON, on the current device."""
    fields = json.loads(config)
    if hasattr(diffusers, class_name):
        return getattr(diffusers, class_name).from_config(fields)
    return getattr(transformers, class_name)(CLIPTextConfig(**fields))


def _check_tower(checkpoint: Checkpoint, part: str) -> CLIPTextConfig:
    """Checks one of CLIP's towers, and returns its configuration."""
    given = checkpoint.config(part)
    for name in ("hidden_size", "max_position_embeddings", "vocab_size"):
        if name in given:
            check_whole(checkpoint, part, name, given[name])
    for name, value in given.items():
        if name.endswith(ID) and not (type(value) is int or (value is None and name != END)):
            text = f"{_file(checkpoint, part)}: {name}={shown(value)} is invalid"
            raise CheckpointError(f"{text}: must be a whole number")
        if name in TYPES and not isinstance(value, str | NoneType):
            text = f"{_file(checkpoint, part)}: {name}={shown(value)} is invalid"
            raise CheckpointError(f"{text}: must be a text, as float16")
    if given.get("use_attention_mask"):  # diffusers then hides the padding from the tower
        text = f"{_file(checkpoint, part)}: use_attention_mask=true is not served"
        raise CheckpointError(f"{text}: must be false")
    tower = without_weights(checkpoint, part).config
    left = tower.num_hidden_layers - checkpoint.clip_skip
    if left < 2:
        raise CheckpointError(
            f"--clip-skip {checkpoint.clip_skip} is invalid: {part} has"
            f" {tower.num_hidden_layers} layers, at most {tower.num_hidden_layers - 2} can go"
        )
    return tower


def check_unet(
    checkpoint: Checkpoint, config: Mapping[str, Any], pooled: int | None = None
) -> None:
    """Checks the inputs of a UNet, and the sizes that the rest of the pipeline depends on."""
    for name in ("in_channels", "out_channels"):
        check_whole(checkpoint, "unet", name, config.get(name, 4))
    check_inputs(config, pooled)
    check_widths(checkpoint, "unet", config, "block_out_channels")
    if config.get("time_cond_proj_dim") is not None:
        check_whole(checkpoint, "unet", "time_cond_proj_dim", config["time_cond_proj_dim"])


def check_vae(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Checks what the decoder does with latents, and builds it."""
    tiny = checkpoint.classes["vae"] == "AutoencoderTiny"
    for name in ("scaling_factor", "shift_factor"):
        value = config.get(name, 1.0)
        if name == "shift_factor" and value is None:
            continue
        _check_number(checkpoint, "vae", name, value, positive=name == "scaling_factor")
    check_widths(
        checkpoint, "vae", config, "decoder_block_out_channels" if tiny else "block_out_channels"
    )
    if tiny and config.get("upsampling_scaling_factor", 2) != 2:
        value = config["upsampling_scaling_factor"]
        raise CheckpointError(f"vae has upsampling_scaling_factor {value!r}, only 2 is served")
    if (colours := config.get("out_channels", 3)) != 3:
        text = f"{_file(checkpoint, 'vae')}: out_channels={colours!r} is not served"
        raise CheckpointError(f"{text}: must be 3, red, green and blue")
    vae = without_weights(checkpoint, "vae")
    channels = vae.config.get("vq_embed_dim") or vae.config.latent_channels
    painted = checkpoint.config("unet").get("in_channels", 4)
    if channels != painted:
        raise CheckpointError(f"vae decodes latents of {channels} channels, unet paints {painted}")
    for name in ("latents_mean", "latents_std"):
        values = config.get(name)
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != channels:
            raise CheckpointError(
                f"{checkpoint.folders['vae']}/config.json: {name}={values!r} is invalid:"
                f" must be {channels} numbers, one a channel"
            )
        for value in values:
            _check_number(checkpoint, "vae", name, value, positive=name == "latents_std")


def check_whole(checkpoint: Checkpoint, part: str, name: str, value: Any) -> None:
    """Raises CheckpointError where a field is no whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        file = checkpoint.folders[part] / "config.json"
        raise CheckpointError(
            f"{file}: {name}={value!r} is invalid: must be a whole number above 0"
        )


def check_widths(checkpoint: Checkpoint, part: str, config: Mapping[str, Any], name: str) -> None:
    """Raises CheckpointError where a field is no list of whole numbers above 0."""
    values = config.get(name, [1])
    good = isinstance(values, list) and values
    if not good or not all(
        isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values
    ):
        file = checkpoint.folders[part] / "config.json"
        text = f"{file}: {name}={values!r} is invalid"
        raise CheckpointError(f"{text}: must be a list of whole numbers above 0")


def _check_number(checkpoint: Checkpoint, part: str, name: str, value: Any, positive: bool) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or (positive and value <= 0):
        file = checkpoint.folders[part] / "config.json"
        allowed = "a number above 0" if positive else "a number"
        raise CheckpointError(f"{file}: {name}={value!r} is invalid: must be {allowed}")


def _build(checkpoint: Checkpoint, part: str, make: Any) -> Any:
    """A network without memory for its weights."""
    try:
        with torch.device("meta"):
            return make()
    except CheckpointError:
        raise
    except Exception as error:
        file = checkpoint.folders[part] / "config.json"
        name = checkpoint.classes.get(part)
        raise CheckpointError(f"{file} makes no {name}: {first_line(error)}") from error


def _check_fusion(checkpoint: Checkpoint, width: int) -> None:
    """Checks that the fusion head fits the encoders on both of its sides."""
    from export import bert

    network = _build(checkpoint, "bert", lambda: bert.build(checkpoint))
    check_whole(checkpoint, "bert", "hidden_size", network.config.hidden_size)
    if "fusion" not in checkpoint.folders:
        return
    bert.check_layers(checkpoint)
    config = checkpoint.config("fusion")
    head = _build(checkpoint, "fusion", lambda: FusionHead.from_config(config)).config
    for name, value, other in (
        ("width", head.width, width),
        ("bert_width", head.bert_width, network.config.hidden_size),
    ):
        if value != other:
            raise CheckpointError(f"fusion has {name} {value}, its encoder has {other}")
