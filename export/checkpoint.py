"""Opening a checkpoint: which parts it must have, and what is rejected before a weight is read.

Only safetensors are read; nothing here runs code that a checkpoint brings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from export.layout import PARTS, Unpacked, find_parts
from export.lora import Lora, check_loras, fuse
from export.source import Source, Tree, check_source
from export.weights import choose_weights, read_json
from networks.loading import CheckpointError, hollow_part, load_part, refusing
from twinbrush.server.manifest import sha256_of

__all__ = ["PREDICTION_TYPES", "Checkpoint", "Serving", "open_checkpoint"]

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Serving:
    """What an export changes of a checkpoint.

    Attributes:
        sampler: in place of the checkpoint's scheduler; None keeps it.
        defaults: of requests, over those of the checkpoint.
        loras: fused into the networks as they are loaded.
        lora_set: beside the networks, by the names with which requests switch them on.
        prediction_type: of the UNet, in place of what the scheduler's file says; None keeps it.
    """

    sampler: str | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    loras: tuple[Lora, ...] = ()
    lora_set: dict[str, Lora] = field(default_factory=dict)
    prediction_type: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint.

    Attributes:
        name: for people.
        revisions: commit of each source that came from the hub, by hub id.
        folders: where each part is; `fusion` may be missing, and then starts as the identity.
        classes: class name of each part.
        index: `model_index.json`.
        weights: variant and file names that each network is loaded from.
        clip_skip: layers of CLIP's towers, from the end, whose results are not used.
        file: the single file that the checkpoint is, None of a folder.
        unpacked: keeps the parts of single files for as long as the checkpoint lives.
        guesses: sentences about what no file of the checkpoint says.
        serving: what the export changes of it.
        hollow: whether its networks are loaded without their weights, on PyTorch's meta device.
    """

    name: str
    revisions: dict[str, str]
    folders: dict[str, Path]
    classes: dict[str, str]
    index: dict[str, Any]
    weights: dict[str, tuple[str | None, list[str]]] = field(default_factory=dict)
    clip_skip: int = 0
    file: Path | None = None
    unpacked: tuple[Unpacked, ...] = ()
    guesses: list[str] = field(default_factory=list)
    serving: Serving = field(default_factory=Serving)
    hollow: bool = False

    @contextmanager
    def naming_its_file(self) -> Iterator[None]:
        """Makes errors name single files, not the folders that they were unpacked into."""
        try:
            yield
        except CheckpointError as error:
            if not self.unpacked:
                raise
            text = str(error)
            for single in self.unpacked:
                text = text.replace(f"{single.scratch.name}/", f"{single.file}: ")
            raise CheckpointError(text) from error

    def config(self, part: str) -> dict[str, Any]:
        """The part's JSON; of the scheduler, with what the export changes."""
        if part != "scheduler":
            return read_json(self.folders[part] / "config.json")
        config = read_json(self.folders[part] / "scheduler_config.json")
        replaced = self.serving.prediction_type
        return config | ({"prediction_type": replaced} if replaced else {})

    def load(self, part: str, model_class: Any, **options: Any) -> Any:
        """The part's torch module, with the LoRAs fused: see `load_part`."""
        if self.hollow:
            options.pop("unused", None)
            return hollow_part(self.folders[part], model_class, **options)
        variant, files = self.weights.get(part, (None, []))
        if variant is not None:
            options["variant"] = variant
        options["files"] = files
        network = load_part(self.folders[part], model_class, **options)
        fuse(network, part, self.serving.loras)
        return network

    def weights_hash(self) -> str:
        """SHA-256 of its weights in hexadecimal; of a single file, that of the file.

        A1111 and the sites that share checkpoints name a single file by the first ten digits.
        """
        if self.file is not None and not self.serving.loras:
            return sha256_of(self.file)
        lines = [
            f"{part}/{name} {sha256_of(self.folders[part] / name)}"
            for part, (_, files) in sorted(self.weights.items())
            for name in files
        ]
        lines += [f"{lora.sha256} {lora.scale:g}" for lora in self.serving.loras]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def lora_set_of(self, part: str) -> list[dict[str, Any]]:
        """Records of the LoRAs that requests can switch on in a part."""
        loras = self.serving.lora_set.items()
        return [{"name": name, **lora.record()} for name, lora in loras if part in lora.parts]

    def loras_of(self, part: str) -> list[dict[str, Any]]:
        """Records of the LoRAs in a part: fused before it was saved, and those of this export."""
        records = [*self.index.get("loras", []), *(lora.record() for lora in self.serving.loras)]
        return [record for record in records if part in record["parts"]]


def open_checkpoint(
    source: Source | str | Path,
    bert: str | Path | None = None,
    keep_bert: bool = False,
    serving: Serving | None = None,
) -> Checkpoint:
    """Checks that a checkpoint has every part, each of a class that can be exported.

    Everything that JSON can tell is checked before a weight is read or downloaded.

    Args:
        source: the checkpoint; a text or path is its folder, file or hub id.
        bert: replaces the text model of `source`; without a fusion head of its own the
            checkpoint gets a new one.
        keep_bert: takes a `bert` only where the checkpoint has no text model of its own.
        serving: what the export changes of it. LoRAs that the checkpoint records as fused are
            not fused again.

    Raises:
        CheckpointError: with the first thing that is wrong.
    """
    if not isinstance(source, Source):
        source = Source(str(source))
    with refusing(source.checkpoint):
        return _open(source, bert, keep_bert, serving)


def _open(
    source: Source, bert: str | Path | None, keep_bert: bool, serving: Serving | None
) -> Checkpoint:
    if bert is not None:
        source = replace(source, bert=str(bert))
    check_source(source)
    serving = serving or Serving()
    if serving.prediction_type not in (None, *PREDICTION_TYPES):
        raise CheckpointError(
            f"--prediction-type {serving.prediction_type} is invalid: must be one of"
            f" {', '.join(PREDICTION_TYPES)}"
        )
    found = find_parts(source, keep_bert, serving.prediction_type)
    opened = Checkpoint(
        found.name, found.revisions, found.folders, found.classes, found.index,
        clip_skip=source.clip_skip, file=found.file, unpacked=found.unpacked,
        guesses=found.guesses,
    )  # fmt: skip
    with opened.naming_its_file():
        return _checked(opened, found.trees, source.variant, serving)


def _checked(
    opened: Checkpoint, trees: dict[str, tuple[Tree, str]], preferred: str | None, serving: Serving
) -> Checkpoint:
    """The checkpoint with its weights chosen, checked and downloaded."""
    from export.checks import check_configs, check_weights, without_weights

    weights, wanted = {}, {}
    for part in opened.folders:
        tree, name = trees[part]
        if part in PARTS:
            variant, files = choose_weights(tree.within(name), opened.folders[part], preferred)
            weights[part] = variant, files
            wanted.setdefault(id(tree), (tree, []))[1].extend(_join(name, f) for f in files)
    opened = replace(opened, weights=weights, serving=_to_fuse(serving, opened))
    check_configs(opened)
    loras = (*opened.serving.loras, *opened.serving.lora_set.values())
    check_loras(loras, lambda part: without_weights(opened, part))
    for tree, names in wanted.values():
        tree.fetch(names)
    check_weights(opened)
    return opened


def _to_fuse(serving: Serving, opened: Checkpoint) -> Serving:
    """Without the LoRAs that were fused before the checkpoint was saved."""
    records = opened.index.get("loras", [])
    fields = {"file", "sha256", "scale", "parts"}
    if not isinstance(records, list) or not all(
        isinstance(record, dict) and record.keys() >= fields for record in records
    ):
        raise CheckpointError(f"{opened.name}: the loras of its model_index.json cannot be read")
    fused = {record["sha256"]: record["scale"] for record in records}
    for lora in serving.loras:
        if fused.get(lora.sha256, lora.scale) != lora.scale:
            raise CheckpointError(
                f"--lora {lora.file}:{lora.scale:g}: {opened.name} has it fused already, with"
                f" scale {fused[lora.sha256]:g}"
            )
    loras = tuple(lora for lora in serving.loras if lora.sha256 not in fused)
    return replace(serving, loras=loras)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
