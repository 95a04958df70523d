"""Structured pruning of a checkpoint: `--prune unet=0.3,clip_text=0.25`.

A ratio is the share of a model's MACs to remove, for one row at the size it was trained on.
What goes are the attention heads, feed-forward widths and inner channels of residual blocks
that matter least to the output for the MACs that they cost (`channel_groups`). Neither data
nor labels are needed: importance is measured on random inputs.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import diffusers
import transformers
from torch import nn

from export.channel_groups import ChannelGroup, channel_groups, choose, importances, units
from export.checkpoint import Checkpoint, open_checkpoint
from export.layout import FORMER
from export.macs import count_macs, native_rows, positions
from export.part import Part
from export.precision import Precision
from export.repository import SOURCE, load_outlines, load_part
from export.resources import check_disk, weight_count
from export.source import Source
from networks.loading import CheckpointError
from networks.pruned import (
    Pruning,
    attention_widths,
    pruning_of,
    save_pruned,
    scale_heads,
    settle_widths,
)

ROWS = 128  # of random inputs that importance is measured on


class RatioError(CheckpointError):
    """That share of a model cannot be removed; the message says why, or how much can."""


def parse_ratios(text: str) -> dict[str, float]:
    """`unet=0.3,bert=0.25` as a mapping.

    Raises:
        ValueError: a model that cannot be pruned, or a ratio that is none.
    """
    ratios = {}
    for entry in text.split(","):
        name, _, number = (word.strip() for word in entry.partition("="))
        if name not in SOURCE:
            raise ValueError(f"--prune {name!r} cannot be pruned: {', '.join(SOURCE)} can")
        try:
            ratio = float(number)
        except ValueError:
            ratio = 0.0
        if not 0 < ratio < 1:
            allowed = "a share of its MACs to remove, over 0 and under 1"
            raise ValueError(f"--prune {name}={number} is not allowed: {allowed}")
        if name in ratios:
            raise ValueError(f"--prune {name} is named twice")
        ratios[name] = ratio
    return ratios


def prune(part: Part, ratio: float) -> Pruning:
    """Removes at least `ratio` of a model's MACs, in place, and at most one unit more.

    Units are those of `channel_groups.units`; counts are rounded to them, so no ratio breaks a
    GroupNorm.

    Raises:
        ValueError: so much cannot be removed; the message says how much can.
    """
    module = part.module
    if not any(isinstance(layer, nn.Linear | nn.Conv2d) for layer in module.modules()):
        name = type(network(part)).__name__
        raise ValueError(f"--prune {part.name}: no layer of a {name} can be pruned")
    macs, parameters = count_macs(part), _parameters(module)
    groups, at = channel_groups(module, part.example(2, 2)), positions(part)
    heads, channels = _counts(groups)
    worth = importances(module, groups, native_rows(part, ROWS))
    for group, importance in zip(groups, worth, strict=True):
        group.units = units(group, importance)
        group.attention_macs = _attention_macs(group, at)
    gone, removed = choose(groups, at, int(ratio * macs) + 1)
    if removed < ratio * macs:
        most = int(100 * removed / macs) / 100
        raise ValueError(f"--prune {part.name}={ratio} is not allowed: at most {most} can go")
    widths = list(attention_widths(module))
    for group, some in gone.items():
        group.remove(some)
    settle_widths(module)
    scale_heads(widths)
    heads_left, channels_left = _counts(groups)
    return Pruning(
        ratio=ratio,
        parameters=(parameters, _parameters(module)),
        macs=(macs, count_macs(part)),
        heads=(heads, heads_left),
        channels=(channels, channels_left),
    )


def _attention_macs(group: ChannelGroup, at: Mapping[nn.Module, int]) -> int:
    """Of one channel in queries times keys, and again in weights times values."""
    if not group.head_width:
        return 0
    queries = at[group.reader]
    keys = next((at[layer] for layer in group.writers if at[layer] != queries), queries)
    return 2 * queries * keys


def _counts(groups: list[ChannelGroup]) -> tuple[int, int]:
    """Heads, and channels that are in no head."""
    return (
        sum(group.heads for group in groups),
        sum(group.width for group in groups if not group.head_width),
    )


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def prune_checkpoint(
    checkpoint: Checkpoint,
    ratios: Mapping[str, float],
    folder: Path,
    progress: Callable[[str], None] = lambda model: None,
) -> Checkpoint:
    """Writes a checkpoint with pruned parts to `folder`, and opens it.

    Raises:
        RatioError: a model cannot be pruned so.
        CheckpointError: the folder is there or cannot be written, or a model is pruned.
        ResourceError: its disk has not enough room.
    """
    if folder.exists():
        raise CheckpointError(
            f"{folder} is there already: the pruned checkpoint needs a new folder"
        )
    for name in ratios:
        if SOURCE[name] not in checkpoint.folders:
            raise CheckpointError(f"--prune {name}: {checkpoint.name} has no {name}")
        if pruning_of(checkpoint.folders[SOURCE[name]]):
            raise CheckpointError(f"--prune {name}: {checkpoint.name} has it pruned already")
    weights = sum(map(weight_count, checkpoint.folders.values()))
    check_disk(folder.parent, weights * Precision.FP32.bytes)
    parts, done = load_outlines(checkpoint), {}
    for name, ratio in ratios.items():
        progress(name)
        parts[name] = load_part(checkpoint, name, parts)
        try:
            done[name] = prune(parts[name], ratio)
        except ValueError as error:
            raise RatioError(str(error)) from error
    try:
        with tempfile.TemporaryDirectory(prefix=".pruning-", dir=folder.parent) as scratch:
            stage = Path(scratch) / folder.name
            pruned = [SOURCE[name] for name in ratios]
            fused = {part for lora in checkpoint.serving.loras for part in lora.parts} - {*pruned}
            _copy(checkpoint, parts["fusion"], stage, without=[*pruned, *fused])
            for part in fused:
                _save_fused(checkpoint, part, stage / part)
            for name, pruning in done.items():
                save_part(checkpoint, parts[name], pruning, stage / SOURCE[name])
            os.replace(stage, folder)
    except OSError as error:
        # What cannot be copied comes as a list, with a reason for each file.
        reason = error.args[0][0][-1] if isinstance(error, shutil.Error) else error.strerror
        raise CheckpointError(f"cannot write {folder}: {reason or error}") from error
    serving = replace(checkpoint.serving, loras=())
    source = Source(str(folder), clip_skip=checkpoint.clip_skip)
    opened = open_checkpoint(source, serving=serving)
    return replace(opened, name=checkpoint.name, revisions=checkpoint.revisions)


def save_part(checkpoint: Checkpoint, part: Part, pruning: Pruning, folder: Path) -> None:
    """Writes what a pruned model holds into a part's folder, with what it does not serve.

    Args:
        checkpoint: that the part was loaded from.
    """
    served = network(part)
    whole = checkpoint.load(SOURCE[part.name], type(served))
    for name, module in served.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            whole.get_submodule(name).register_parameter(key, parameter)
    save_pruned(whole, folder, pruning)


def _save_fused(checkpoint: Checkpoint, part: str, folder: Path) -> None:
    """Writes a part that LoRAs changed and pruning does not."""
    name = checkpoint.classes[part]
    library = diffusers if hasattr(diffusers, name) else transformers
    fused = checkpoint.load(part, getattr(library, name))
    if pruning := pruning_of(checkpoint.folders[part]):
        save_pruned(fused, folder, pruning)
    else:
        fused.save_pretrained(folder)


def network(part: Part) -> nn.Module:
    """The diffusers or transformers model in a part's wrapper."""
    wrapped = {"fusion": "head", "unet": "unet", "vqgan_decoder": "vae"}
    return part.module.get_submodule(wrapped.get(part.name, "encoder"))


def _copy(checkpoint: Checkpoint, fusion: Part, folder: Path, without: list[str]) -> None:
    """Everything of a checkpoint that stays as it is, in one folder in diffusers layout."""
    folder.mkdir()
    root = checkpoint.folders["unet"].parent
    # Parts under former names are among the folders under their names of now.
    known = {
        old
        for new, old in FORMER.items()
        if new in checkpoint.folders and checkpoint.folders[new].name == old
    }
    named = {name for name, entry in checkpoint.index.items() if isinstance(entry, list)} - known
    for part in sorted({*named, *checkpoint.folders} - {*without}):
        source = checkpoint.folders.get(part, root / part)
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=_unread(checkpoint, part))
    classes = {
        part: [checkpoint.index.get(part, ["transformers"])[0], name]
        for part, name in checkpoint.classes.items()
    }
    if "fusion" not in checkpoint.folders and "bert" in checkpoint.folders:
        network(fusion).save_pretrained(folder / "fusion")
        classes["fusion"] = ["networks.fusion_head", "FusionHead"]
    kept = {name: entry for name, entry in checkpoint.index.items() if name not in known}
    records = [
        *checkpoint.index.get("loras", []),
        *(lora.record() for lora in checkpoint.serving.loras),
    ]
    if records:
        kept["loras"] = records
    index = json.dumps(kept | classes, indent=2)
    (folder / "model_index.json").write_text(index + "\n")


def _unread(checkpoint: Checkpoint, part: str) -> Callable[[str, list[str]], list[str]]:
    """Which files of a part are not copied: pickles, and weights that are not loaded from."""
    read = checkpoint.weights.get(part, (None, []))[1]
    tokenizer = part in ("tokenizer", "bert_tokenizer")

    def unread(folder: str, names: list[str]) -> list[str]:
        weights = part in checkpoint.weights or tokenizer
        return [
            name
            for name in names
            if name.endswith(".bin")
            or (weights and name.endswith(".safetensors") and name not in read)
        ]

    return unread
