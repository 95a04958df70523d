"""Pruned parts on disk: `shapes.json` beside the safetensors, and the module rebuilt from both.

`shapes.json` holds the shape of every tensor and what pruning removed. The configuration stays
that of the unpruned class; what is narrower follows from the shapes alone. Knows nothing of
how channels are chosen.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import AutoConfig

SHAPES = "shapes.json"
HEADS = ("heads", "num_heads", "num_attention_heads", "n_heads")  # as attention classes call it


@dataclass(frozen=True)
class Pruning:
    """What was removed from a model.

    Attributes:
        ratio: share of the MACs that was asked to go.
        parameters, macs: before and after; MACs of one row at the native size.
        heads, channels: before and after, over all layers that can be pruned; channels count
            feed-forward widths and the inner channels of residual blocks.
    """

    ratio: float
    parameters: tuple[int, int]
    macs: tuple[int, int]
    heads: tuple[int, int]
    channels: tuple[int, int]


def save_pruned(module: nn.Module, folder: Path, pruning: Pruning) -> None:
    """Writes configuration, safetensors and `shapes.json`.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = "model.safetensors"
    if isinstance(module, diffusers.ModelMixin):
        module.save_config(folder)
        name = "diffusion_pytorch_model.safetensors"
    else:
        module.config.save_pretrained(folder)
    try:
        save_model(module, str(folder / f"{name}.part"))
    except SafetensorError as error:  # also where the disk is full
        raise OSError(str(error)) from error
    os.replace(folder / f"{name}.part", folder / name)
    shapes = {key: list(tensor.shape) for key, tensor in module.state_dict().items()}
    record = {"pruning": asdict(pruning), "shapes": shapes}
    (folder / SHAPES).write_text(json.dumps(record, indent=1) + "\n")


def pruning_of(folder: Path) -> Pruning | None:
    """What was removed from the part in `folder`; None where it is whole.

    Raises:
        ValueError: `shapes.json` is not of this form.
    """
    return _read(folder)[0] if (folder / SHAPES).exists() else None


def load_pruned(folder: Path, model_class: Any, **options: Any) -> nn.Module:
    """A module of `model_class` with the shapes and weights of `folder`.

    Raises:
        ValueError: `shapes.json`, the configuration and the weights do not fit each other.
    """
    module = build_unset(folder, model_class, **options)
    (file,) = folder.glob("*.safetensors")
    try:
        load_model(module, str(file))
    except (RuntimeError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"{file.name} does not match {SHAPES}: {lines[-1]}") from error
    return module


def build_unset(folder: Path, model_class: Any, **options: Any) -> nn.Module:
    """A module of `model_class` with the shapes of `folder`, whose weights are not read.

    Raises:
        ValueError: `shapes.json` and the configuration do not fit each other.
    """
    if hasattr(model_class, "load_config"):
        module = model_class.from_config(model_class.load_config(folder))
    elif model_class.__module__.startswith(transformers.models.auto.__name__):
        config = AutoConfig.from_pretrained(folder, **{"trust_remote_code": False} | options)
        module = model_class.from_config(config)
    else:
        module = model_class(model_class.config_class.from_pretrained(folder))
    if (folder / SHAPES).exists():
        resize(module, _read(folder)[1])
    return module


def resize(module: nn.Module, shapes: Mapping[str, list[int]]) -> None:
    """Gives the tensors of `module` new shapes, unset, and its layers the widths that follow.

    Raises:
        ValueError: `shapes` names other tensors, or changes one that cannot be pruned.
    """
    before = list(attention_widths(module))
    known = module.state_dict()
    if known.keys() != shapes.keys():
        name = min(known.keys() ^ shapes.keys())
        where = "lacks" if name in known else "has"
        raise ValueError(f"{SHAPES} {where} {name}, which its configuration does not say")
    for name, shape in shapes.items():
        tensor: Tensor = known[name]
        if tensor.shape == tuple(shape):
            continue
        owner, _, key = name.rpartition(".")
        layer = module.get_submodule(owner)
        if not isinstance(layer, nn.Linear | nn.Conv2d | nn.GroupNorm) or tensor.ndim != len(shape):
            raise ValueError(f"{SHAPES} gives {name} {shape}: it has {list(tensor.shape)}")
        setattr(layer, key, nn.Parameter(tensor.new_empty(shape)))
    settle_widths(module)
    scale_heads(before)


def settle_widths(module: nn.Module) -> None:
    """Makes what layers say of their widths agree with their weights."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
        elif isinstance(layer, nn.Conv2d):
            layer.out_channels, layer.in_channels = layer.weight.shape[:2]
        elif isinstance(layer, nn.GroupNorm):
            layer.num_channels = len(layer.weight)
    for layer in module.modules():  # diffusers' samplers check their input
        conv = getattr(layer, "conv", None)
        if hasattr(layer, "channels") and isinstance(conv, nn.Conv2d):
            layer.channels = conv.in_channels


def head_attribute(layer: nn.Module) -> str | None:
    """The attribute in which an attention layer keeps its number of heads."""
    return next((name for name in HEADS if isinstance(vars(layer).get(name), int)), None)


def attention_widths(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Linear, int]]:
    """Attention layers, one of their projections each, and how wide it is now."""
    for layer in module.modules():
        projection = next((c for c in layer.children() if isinstance(c, nn.Linear)), None)
        if projection is not None and head_attribute(layer):
            yield layer, projection, len(projection.weight)


def scale_heads(before: list[tuple[nn.Module, nn.Linear, int]]) -> None:
    """Lets numbers of heads follow the widths that changed since `attention_widths`."""
    for layer, projection, width in before:
        name = head_attribute(layer)
        setattr(layer, name, getattr(layer, name) * len(projection.weight) // width)


def _read(folder: Path) -> tuple[Pruning, dict[str, list[int]]]:
    try:
        record = json.loads((folder / SHAPES).read_text())
        pruning = Pruning(**{
            key: tuple(value) if isinstance(value, list) else value
            for key, value in record["pruning"].items()
        })  # fmt: skip
        return pruning, record["shapes"]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / SHAPES} is not a manifest of shapes: {error!r}") from error
