"""Opening a checkpoint: which parts it must have, and what is rejected before a weight is read.

Only safetensors are read; nothing here runs code that a checkpoint brings.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from export.lora import Lora, check_loras, fuse
from export.source import Source, Tree, check_source, open_tree
from export.weights import LFS, choose_weights, lfs_pointer, read_json, variants_of
from networks.loading import CheckpointError, hollow_part, load_part, refusing
from twinbrush.server.manifest import sha256_of

__all__ = ["PARTS", "Checkpoint", "Serving", "open_checkpoint"]

# Classes that each part may be of; None is any text model that transformers knows.
PARTS = {
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "bert": None,
    "fusion": ("FusionHead",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("VQModel", "AutoencoderKL", "AutoencoderTiny"),
}
OTHERS = ("tokenizer", "tokenizer_2", "bert_tokenizer", "scheduler")
# Names of parts in checkpoints of earlier versions, where the class is none of CLIP's.
FORMER = {"bert": "text_encoder_2", "bert_tokenizer": "tokenizer_2"}
PIPELINES = (
    "TwinbrushPipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline",
    "LatentConsistencyModelPipeline",
)  # fmt: skip
# Parts that a checkpoint may be without, each with what belongs to it.
OPTIONAL = (("text_encoder_2", "tokenizer_2"), ("bert", "bert_tokenizer"), ("fusion",))
# A tokenizer needs all files of one of these; transformers makes an empty one without them.
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")


@dataclass(frozen=True)
class Serving:
    """What an export changes of a checkpoint.

    Attributes:
        sampler: in place of the checkpoint's scheduler; None keeps it.
        defaults: of requests, over those of the checkpoint.
        loras: fused into the networks as they are loaded.
        lora_set: beside the networks, by the names with which requests switch them on.
    """

    sampler: str | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    loras: tuple[Lora, ...] = ()
    lora_set: dict[str, Lora] = field(default_factory=dict)


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
        scratch: keeps the converted parts of a single file for as long as the checkpoint lives.
        file: the single file that the checkpoint is, None of a folder.
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
    scratch: tempfile.TemporaryDirectory | None = None
    file: Path | None = None
    serving: Serving = field(default_factory=Serving)
    hollow: bool = False

    @contextmanager
    def naming_its_file(self) -> Iterator[None]:
        """Makes errors name the single file, not the folder that it was unpacked into."""
        try:
            yield
        except CheckpointError as error:
            if self.scratch is None:
                raise
            text = str(error).replace(f"{self.scratch.name}/", f"{self.file}: ")
            raise CheckpointError(text) from error

    def config(self, part: str) -> dict[str, Any]:
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        return read_json(self.folders[part] / name)

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
    opened, trees = _find_parts(source, keep_bert)
    with opened.naming_its_file():
        return _checked(opened, trees, source.variant, serving or Serving())


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


def _find_parts(source: Source, keep_bert: bool) -> tuple[Checkpoint, dict[str, tuple[Tree, str]]]:
    """The parts of a checkpoint, and the tree and folder name that each is from."""
    name, scratch, tree = _open_root(source)
    single = Path(source.checkpoint).expanduser() if scratch else None
    file = tree.folder / "model_index.json"
    if "model_index.json" not in tree.names:
        raise CheckpointError(
            f"checkpoint {tree.folder} has no model_index.json: not diffusers layout"
        )
    index = read_json(file)
    names, classes = _read_index(index, file)
    trees = {part: (tree, names[part]) for part in names}
    if source.bert is not None and not (keep_bert and classes.get("bert")):
        other = open_tree(source.bert, source.bert_revision, what="--bert")
        for part in FORMER:
            trees[part], classes[part] = (other, ""), "AutoModel"
    if source.vae is not None:
        trees["vae"], classes["vae"] = _open_vae(source.vae)
    if source.tokenizer is not None:
        other = open_tree(source.tokenizer, what="--tokenizer")
        place = "tokenizer" if other.within("tokenizer") else ""
        trees["tokenizer"], classes["tokenizer"] = (other, place), "CLIPTokenizer"
        if other.within("tokenizer_2"):
            trees["tokenizer_2"], classes["tokenizer_2"] = (other, "tokenizer_2"), "CLIPTokenizer"
    _leave_out_optional(trees, classes)
    for part, (place, folder) in trees.items():
        if part not in classes or not (place.folder / folder).is_dir():
            raise CheckpointError(_lacks(source, part, folder))
        _check_part(part, place, folder, classes)
    _check_variant(source, trees)
    hubs = {place.hub for place, _ in trees.values() if place.hub}
    folders = {part: place.folder / folder for part, (place, folder) in trees.items()}
    opened = Checkpoint(
        name, dict(hubs), folders, classes, index, clip_skip=source.clip_skip, scratch=scratch,
        file=single,
    )  # fmt: skip
    return opened, trees


def _leave_out_optional(trees: dict[str, tuple[Tree, str]], classes: dict[str, str]) -> None:
    """Removes the optional parts that a checkpoint does not have."""
    if "text_encoder_2" in classes and "tokenizer_2" not in classes:
        trees["tokenizer_2"] = trees["tokenizer"]  # a single file has one vocabulary for both
        classes["tokenizer_2"] = classes.get("tokenizer", "CLIPTokenizer")
    if "text_encoder_2" not in classes:
        classes.pop("tokenizer_2", None)
    needed = ("bert",) if "fusion" in classes else ()  # the head was trained with it
    for together in OPTIONAL:
        if not any(part in classes for part in together) and together[0] not in needed:
            for part in together:
                del trees[part]


def _open_root(source: Source) -> tuple[str, tempfile.TemporaryDirectory | None, Tree]:
    path = Path(source.checkpoint).expanduser()
    if path.is_file() and path.suffix.lower() == ".safetensors":
        from export.resources import check_disk
        from export.single_file import unpack

        if source.tokenizer is None:
            text = f"{path} is a single file, which has no tokenizer"
            raise CheckpointError(
                f"{text}: --tokenizer names a folder with CLIP's vocab.json and merges.txt"
            )
        check_disk(Path(tempfile.gettempdir()), path.stat().st_size)
        scratch = tempfile.TemporaryDirectory(prefix="twinbrush-")
        elsewhere = () if source.vae is None else ("vae",)
        with refusing(path):
            unpack(path, Path(scratch.name), PIPELINES, elsewhere)
        return path.stem, scratch, open_tree(scratch.name)
    tree = open_tree(source.checkpoint, source.revision, source.subfolder)
    return Path(os.path.abspath(path)).name, None, tree  # a link's own name, not its target's


def _read_index(index: dict[str, Any], file: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Folder name and class name of each part."""
    promised = index.get("_class_name", PIPELINES[0])
    if promised not in PIPELINES:
        text = f"{file} has _class_name {promised!r}, which is not served"
        raise CheckpointError(f"{text}: {', '.join(PIPELINES)} are")
    defaults = index.get("defaults", {})
    if not isinstance(defaults, dict):
        allowed = 'an object of request fields, as {"steps": 4}'
        raise CheckpointError(f"{file} has defaults {defaults!r}, which is not allowed: {allowed}")
    names = {part: part for part in (*PARTS, *OTHERS)}
    classes = {}
    for part in names:
        entry = index.get(part)
        former = index.get(FORMER.get(part, ""))
        if part in FORMER.values() and not _is_second_tower(index):
            continue
        if entry is None and _is_class(former) and not _is_second_tower(index):
            entry, names[part] = former, FORMER[part]
        if entry is None or entry == [None, None]:
            continue
        if not _is_class(entry):
            text = f"{file} has {part} {entry!r}, which is not allowed"
            raise CheckpointError(f"{text}: a library and a class, both in quotes")
        classes[part] = entry[1]
    return names, classes


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


def _is_second_tower(index: dict[str, Any]) -> bool:
    """Whether `text_encoder_2` is one of CLIP's, not a text model under its former name."""
    entry = index.get("text_encoder_2")
    return _is_class(entry) and entry[1].startswith("CLIP")


def _is_class(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)


def _lacks(source: Source, part: str, folder: str) -> str:
    hints = {
        "bert": "; --bert names a text model to take",
        "bert_tokenizer": "; --bert names a text model to take",
        "vae": "; --vae names an autoencoder to take",
        "tokenizer": "; --tokenizer names a folder with vocab.json and merges.txt",
    }
    return f"checkpoint {source.checkpoint} lacks its part {folder or part}/{hints.get(part, '')}"


def _open_vae(place: str) -> tuple[tuple[Tree, str], str]:
    """An autoencoder alone, or that of a checkpoint."""
    tree = open_tree(place, what="--vae")
    folder = "" if "config.json" in tree.names else "vae"
    if f"{folder}/config.json".lstrip("/") not in tree.names:
        raise CheckpointError(f"--vae {place} has no config.json, at its top or in vae/")
    file = tree.folder / folder / "config.json"
    name = read_json(file).get("_class_name")
    if not isinstance(name, str):
        raise CheckpointError(f"{file} has _class_name {name!r}: it does not say its class")
    return (tree, folder), name


def _check_part(part: str, tree: Tree, name: str, classes: dict[str, str]) -> None:
    folder, files = tree.folder / name, tree.within(name)
    if part not in PARTS:
        if part == "scheduler":
            read_json(folder / "scheduler_config.json")
        else:
            _check_vocabulary(folder, files)
        return
    allowed = PARTS[part]
    if allowed is not None and classes[part] not in allowed:
        text = f"{part} is a {classes[part]}, which cannot be exported"
        raise CheckpointError(f"{text}: {' or '.join(allowed)} can")
    if "config.json" not in files:
        raise CheckpointError(f"{folder} has no config.json: download the part again")
    read_json(folder / "config.json")


def _check_vocabulary(folder: Path, files: list[str]) -> None:
    if not any(all(name in files for name in names) for names in VOCABULARIES):
        either = ", ".join(" with ".join(names) for names in VOCABULARIES)
        if found := [name for name in files if name in SENTENCEPIECE]:
            text = f"{folder} has only {found[0]}, which needs sentencepiece and is not read"
            raise CheckpointError(f"{text}: save the tokenizer as tokenizer.json")
        raise CheckpointError(f"{folder} has no vocabulary: one of {either}")
    for name in files:
        if name.endswith((".json", ".txt")):
            with (folder / name).open("rb") as stream:
                start = stream.read(len(LFS))
            if start == LFS:
                raise CheckpointError(lfs_pointer(folder / name))
            if name in TOKENIZER_FILES and not start:
                raise CheckpointError(f"{folder / name} is empty: download it again")
            if name in TOKENIZER_FILES and name.endswith(".json"):
                read_json(folder / name)


def _check_variant(source: Source, trees: dict[str, tuple[Tree, str]]) -> None:
    if source.variant is None:
        return
    found = {
        variant
        for part, (tree, name) in trees.items()
        if part in PARTS
        for variant in variants_of(tree.within(name))
    }
    if source.variant not in found:
        have = f"they have {', '.join(sorted(found))}" if found else "they have plain weights only"
        raise CheckpointError(f"--variant {source.variant}: no part has such weights, {have}")


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
