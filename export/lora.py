"""LoRA files: read, matched with the layers of a checkpoint, fused into their weights.

Keys of kohya's trainers, diffusers and PEFT are read, on UNet and text encoders. Every key of a
file is used or the file is refused. Fusing adds `scale * alpha / rank * up @ down` to a weight
(arXiv:2106.09685, section 4.1). This module does not know how a checkpoint is opened or served.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn

from export.source import PICKLES
from export.weights import WEIGHT_TYPES, read_header, read_json
from networks.loading import CheckpointError, refusing

KOHYA = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
DOTTED = {f"{part}.": part for part in ("unet", "text_encoder", "text_encoder_2")}
COMFY = {
    "diffusion_model.": "unet",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
# Beginnings of names in files for networks that no checkpoint here has.
STRANGERS = ("lora_", "transformer.", "prior.", "text_encoder_3.", "text_encoders.")
PEFT = "base_model.model."  # of PEFT's own files, whose alpha is in adapter_config.json
# The end of a key, after the layer's name: which factor it is. `_lora` is of diffusers' former
# attention processors, `lora_linear_layer` of its former text encoders.
ROLES = {
    "down": re.compile(
        r"(\.(lora_A|lora_down|lora\.down|lora_linear_layer\.down)(\.[^.]+)?|_lora\.down)\.weight$"
    ),
    "mid": re.compile(r"\.lora_mid\.weight$"),
    "up": re.compile(
        r"(\.(lora_B|lora_up|lora\.up|lora_linear_layer\.up)(\.[^.]+)?|_lora\.up)\.weight$"
    ),
    "alpha": re.compile(r"(\.lora|_lora)?\.alpha$"),
}
# Parts of a key that say which other adapter its file holds.
OTHERS = {
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "oft_": "an OFT",
    "_norm": "trained norms",
    ".diff": "a difference of whole weights",
    ".on_input": "an IA3",
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "lora_embedding": "a LoRA of token embeddings",
    "bundle_emb": "a bundled textual inversion",
}
# Names of layers in diffusers' former attention processors.
FORMER = {"to_out": ("to_out_0", "out_proj"), "to_q": ("q_proj",), "to_k": ("k_proj",),
          "to_v": ("v_proj",)}  # fmt: skip
# PEFT's settings that change what factors mean, with the values that are served.
NOT_SERVED = {
    "use_dora": (False, None), "lora_bias": (False, None), "use_qalora": (False, None),
    "use_bdlora": (False, None), "layer_replication": (None,), "alora_invocation_tokens": (None,),
    "peft_type": ("LORA", None),
    # Others take something out of the weights that the LoRA was trained beside.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}  # fmt: skip
ALPHA_TYPES = ("I64", "I32")  # of an alpha that was given without a point
METADATA = "lora_adapter_metadata"  # diffusers' key in the header, for PEFT's configuration


@dataclass(frozen=True)
class Factors:
    """The keys of one layer in a LoRA file.

    Attributes:
        part: of the checkpoint.
        layer: its name in the file, with `_` for `.`.
        path: its name in the file, with dots where the file has them.
        keys: by role: `down` and `up`, and `alpha` and `mid` where the file has them.
    """

    part: str
    layer: str
    path: str
    keys: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Lora:
    """A LoRA file that was read and whose keys are known.

    Attributes:
        file: in safetensors format.
        scale: of the whole file.
        sha256: of the file.
        factors: one entry a layer.
        settings: PEFT's configuration by part, where the file has one.
    """

    file: Path
    scale: float
    sha256: str
    factors: tuple[Factors, ...]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        return sorted({factors.part for factors in self.factors})

    def record(self) -> dict[str, Any]:
        """What manifests hold of it."""
        names = {"file": self.file.name, "sha256": self.sha256}
        return names | {"scale": self.scale, "parts": self.parts}


def read_lora(text: str) -> Lora:
    """Reads the keys of `FILE[:SCALE]`, and no weight; the scale defaults to 1.

    Raises:
        CheckpointError: the file or the scale cannot be used, or a key is not one of a LoRA.
    """
    file, scale = _parse(text)
    with refusing(f"LoRA {file}"):
        return _read(file, scale)


def _read(file: Path, scale: float) -> Lora:
    header = read_header(file)
    if not header:
        raise CheckpointError(f"LoRA {file} has no tensors: download it again")
    found: dict[tuple[str, str], Factors] = {}
    for key in header:
        part, path, role = _parse_key(key, file)
        layer = path.replace(".processor.", ".").replace(".", "_").removeprefix("text_model_")
        factors = found.setdefault((part, layer), Factors(part, layer, path))
        if role in factors.keys:
            raise CheckpointError(f"LoRA {file}: {key} and {factors.keys[role]} are the same")
        factors.keys[role] = key
    for factors in found.values():
        if missing := {"down", "up"} - factors.keys.keys():
            key = next(iter(factors.keys.values()))
            raise CheckpointError(f"LoRA {file}: {key} has no {min(missing)} factor beside it")
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    settings = _read_settings(file, header)
    return Lora(file, scale, sha256, tuple(found.values()), settings)


def _parse(text: str) -> tuple[Path, float]:
    file, colon, number = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        file, number = text, "1"
    if not file:
        raise CheckpointError(f"LoRA {text!r} has no name: must be a .safetensors file")
    path = Path(file).expanduser()
    try:
        scale = float(number)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale) or scale == 0:
        raise CheckpointError(
            f"--lora {text}: scale {number!r} is invalid: must be a number other than 0"
        )
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"LoRA {path} is a pickle, which can run code and is not read:"
            " convert it to .safetensors"
        )
    if path.is_dir():
        raise CheckpointError(f"LoRA {path} is a folder: name the .safetensors file in it")
    if not path.exists():
        raise CheckpointError(f"LoRA {path} is not there: must be a .safetensors file")
    return path, scale


def _parse_key(key: str, file: Path) -> tuple[str, str, str]:
    """The part, the layer's name and the role of a key."""
    found = {role: match for role, pattern in ROLES.items() if (match := pattern.search(key))}
    if not found:
        kind = next((kind for sign, kind in OTHERS.items() if sign in key), None)
        reason = f"is of {kind}, which is not served" if kind else "is no key of a LoRA"
        raise CheckpointError(
            f"LoRA {file}: {key} {reason}: must be lora_down and lora_up, or lora_A and lora_B,"
            " with alpha"
        )
    ((role, match),) = found.items()
    name = key[: match.start()].removeprefix(PEFT)
    for prefix, part in (KOHYA | DOTTED | COMFY).items():
        if name.startswith(prefix):
            return part, name.removeprefix(prefix).removeprefix(PEFT), role
    if name.startswith(STRANGERS):
        raise CheckpointError(
            f"LoRA {file}: {key} is for a network that is not served: names must begin with"
            f" {', '.join((*KOHYA, *DOTTED))}"
        )
    alone = "text_encoder" if name.startswith("text_model.") else "unet"  # of one network's file
    return alone, name, role


def _read_settings(file: Path, header: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """PEFT's configuration by part: from the file's header, or beside a file of PEFT's own."""
    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get(METADATA)
    if text is not None:
        try:
            settings = json.loads(text)
            by_part = {
                part: {
                    k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)
                }
                for prefix, part in DOTTED.items()
            }
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"LoRA {file}: its {METADATA} cannot be read") from error
    elif any(key.startswith(PEFT) for key in header):
        beside = file.parent / "adapter_config.json"
        if not beside.exists():
            raise CheckpointError(
                f"LoRA {file}: {beside.name} must be beside it, with the alpha of the LoRA"
            )
        by_part = dict.fromkeys(DOTTED.values(), read_json(beside))
    else:
        return {}
    for settings in by_part.values():
        _check_settings(file, settings)
    return by_part


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    """Raises CheckpointError where PEFT's configuration says what is not served."""
    for name, value in settings.items():
        if name in NOT_SERVED and value not in NOT_SERVED[name]:
            raise CheckpointError(f"LoRA {file}: {name}={value!r} is not served")
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"LoRA {file}: alpha_pattern={patterns!r} is invalid: not an object")
    for name, alpha in (("lora_alpha", settings.get("lora_alpha", 1)), *patterns.items()):
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise CheckpointError(f"LoRA {file}: {name}={alpha!r} is invalid: must be a number")
        try:
            re.compile(name)
        except re.error as error:
            text = f"LoRA {file}: alpha_pattern {name!r} is no regular expression"
            raise CheckpointError(f"{text}: {error}") from error


def check_loras(loras: Iterable[Lora], build: Callable[[str], nn.Module | None]) -> None:
    """Matches every key with a layer, before a weight is read.

    Args:
        build: part -> its network without weights, None where the checkpoint does not have it.

    Raises:
        CheckpointError: a LoRA has a key that no layer takes.
    """
    for lora in loras:
        for part in lora.parts:
            network = build(part)
            if network is None:
                factors = next(f for f in lora.factors if f.part == part)
                raise CheckpointError(
                    f"LoRA {lora.file}: {factors.keys['down']} is for {part}, which the"
                    " checkpoint does not have"
                )
            _match(network, part, lora)


def fuse(network: nn.Module, part: str, loras: Iterable[Lora]) -> None:
    """Adds what LoRAs change to the weights of a part, in place.

    Raises:
        CheckpointError: a LoRA does not fit, or has values that are not finite.
    """
    for lora in loras:
        for key, layer, down, up, multiplier in read_factors(network, part, lora):
            with torch.no_grad():
                change = up.flatten(1) @ down.flatten(1)
                weight = layer.weight + lora.scale * multiplier * change.view_as(layer.weight)
                if not weight.isfinite().all():
                    raise CheckpointError(
                        f"LoRA {lora.file}: {key} makes weights that are not finite"
                    )
                layer.weight.copy_(weight)


def read_factors(
    network: nn.Module, part: str, lora: Lora
) -> Iterator[tuple[str, Any, Tensor, Tensor, float]]:
    """What a LoRA holds for a part: a key, the layer, down, up, and alpha over rank.

    Raises:
        CheckpointError: the LoRA does not fit.
    """
    matched = _match(network, part, lora)
    if not matched:
        return
    with safe_open(lora.file, "pt") as opened:
        for factors, layer in matched:
            tensors = {r: opened.get_tensor(k).float() for r, k in factors.keys.items()}
            down, up = tensors["down"], tensors["up"]
            multiplier = _multiplier(lora, factors, len(up[0]), tensors.get("alpha"))
            if "mid" in tensors:
                down = torch.einsum("rs...,si->ri...", tensors["mid"], down.flatten(1))
            yield factors.keys["down"], layer, down, up, multiplier


def _multiplier(lora: Lora, factors: Factors, rank: int, alpha: Tensor | None) -> float:
    """Alpha over rank: of the file's own tensor, of PEFT's configuration, or 1."""
    if alpha is not None:
        return alpha.item() / rank
    settings = lora.settings.get(factors.part)
    if not settings:
        return 1.0
    value = settings.get("lora_alpha", rank)
    for name, special in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({name})$", factors.path):  # as PEFT, of which the first counts
            value = special
            break
    return value / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _match(network: nn.Module, part: str, lora: Lora) -> list[tuple[Factors, Any]]:
    """The layers that a LoRA changes in a part, each with its keys; shapes are checked."""
    wanted = [factors for factors in lora.factors if factors.part == part]
    if not wanted:
        return []
    layers = _layers(network)
    header = read_header(lora.file)
    matched = []
    for factors in wanted:
        key = factors.keys["down"]
        layer = next((layers[n] for n in _names(factors.layer) if n in layers), None)
        if layer is None:
            raise CheckpointError(
                f"LoRA {lora.file}: {key} matches no layer of the checkpoint's {part}:"
                " the LoRA is for another family or has keys that are not served"
            )
        _check_shapes(lora.file, factors, header, layer)
        matched.append((factors, layer))
    return matched


def _names(layer: str) -> list[str]:
    """The names that a layer may go by, the file's own first."""
    names = [layer]
    for former, now in FORMER.items():
        if layer.endswith(former):
            names += [layer.removesuffix(former) + name for name in now]
    return names


def _check_shapes(file: Path, factors: Factors, header: dict[str, Any], layer: Any) -> None:
    """A linear layer also takes factors of a 1x1 convolution, and the other way round."""
    shapes = {role: header[key]["shape"] for role, key in factors.keys.items()}
    down, up, weight = shapes["down"], shapes["up"], list(layer.weight.shape)
    inner = down[0] if down else 0
    rank = up[1] if len(up) > 1 else inner
    allowed = {"up": [weight[0], rank], "down": [rank, *weight[1:]]}
    if "mid" in shapes:  # a Tucker decomposition, of which the middle has the kernel
        allowed |= {"down": [inner, weight[1]], "mid": [rank, inner, *weight[2:]]}
    for role, shape in allowed.items():
        if rank == 0 or 0 in shape or _without_ones(shapes[role]) != _without_ones(shape):
            raise CheckpointError(
                f"LoRA {file}: {factors.keys[role]} has shape {shapes[role]}, its layer has"
                f" {weight}: must be {shape}"
            )
    if math.prod(shapes.get("alpha", [])) != 1:
        raise CheckpointError(
            f"LoRA {file}: {factors.keys['alpha']} has shape {shapes['alpha']}: must be one number"
        )
    for role, key in factors.keys.items():
        if (kind := header[key]["dtype"]) not in WEIGHT_TYPES + (ALPHA_TYPES * (role == "alpha")):
            text = f"LoRA {file}: {key} has type {kind}, which is not read"
            raise CheckpointError(f"{text}: {', '.join(WEIGHT_TYPES)} are")


def _without_ones(shape: list[int]) -> list[int]:
    """A shape without the size of a 1x1 kernel."""
    return shape[:2] if shape[2:] in ([], [1, 1]) else shape


def _layers(network: nn.Module) -> dict[str, nn.Module]:
    """Linear and convolutional layers by their names with `_` for `.`.

    A UNet's have a second name, that of the original latent diffusion code.
    """
    layers = {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    names = {name.removeprefix("text_model.").replace(".", "_"): name for name in layers}
    if isinstance(network, UNet2DConditionModel):
        names |= {_original_name(name, network).replace(".", "_"): name for name in layers}
    return {short: layers[name] for short, name in names.items()}


INNER = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
         "conv_shortcut": "skip_connection"}  # fmt: skip
OUTER = {"conv_in": "input_blocks.0.0", "conv_out": "out.2",
         "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
         "add_embedding.linear_1": "label_emb.0.0",
         "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip


def _original_name(name: str, unet: UNet2DConditionModel) -> str:
    """The name of a layer in the original latent diffusion code (CompVis, Stability)."""
    if name in OUTER:
        return OUTER[name]
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    middle = re.fullmatch(r"mid_block\.(\w+)\.(\d+)\.(.+)", name)
    if match:
        side, block, kind, index = match[1], int(match[2]), match[3], int(match[4])
        rest, blocks = match[5], getattr(unet, f"{side}_blocks")
        # Each residual block counts one, and so does each downsampler.
        before = sum(len(b.resnets) for b in blocks[:block])
        if side == "down":
            before += 1 + block
        if kind == "downsamplers":
            return f"input_blocks.{before + len(blocks[block].resnets)}.0.op"
        if kind == "upsamplers":
            place = 2 if getattr(blocks[block], "attentions", None) else 1
            return f"output_blocks.{before + len(blocks[block].resnets) - 1}.{place}.{rest}"
        start = "input_blocks" if side == "down" else "output_blocks"
        start = f"{start}.{before + index}.{int(kind == 'attentions')}"
    elif middle:
        kind, index, rest = middle[1], int(middle[2]), middle[3]
        start = f"middle_block.{2 * index + (kind == 'attentions')}"
    else:
        return name
    return f"{start}.{INNER.get(rest, rest)}"
