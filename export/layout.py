"""Finding the parts of a checkpoint: where each is, and of which class it must be.

Reads JSON alone, except of single files, which are unpacked. Knows nothing of what an export
changes.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from export.source import Source, Tree, open_tree
from export.vae_file import CLASS, SCALING, SCALING_XL, unpack_vae
from export.weights import LFS, lfs_pointer, read_json, variants_of
from networks.loading import CheckpointError, refusing

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
TWO_TOWERS = "StableDiffusionXLPipeline"
PIPELINES = (
    "TwinbrushPipeline",
    "StableDiffusionPipeline",
    TWO_TOWERS,
    "LatentConsistencyModelPipeline",
)
# Parts that a checkpoint may be without, each with what belongs to it.
OPTIONAL = (("text_encoder_2", "tokenizer_2"), ("bert", "bert_tokenizer"), ("fusion",))
# A tokenizer needs all files of one of these; transformers makes an empty one without them.
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
SUFFIX = ".safetensors"  # of single files
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")


@dataclass(frozen=True)
class Unpacked:
    """A single file, and the folder that keeps its parts for as long as this lives."""

    file: Path
    scratch: tempfile.TemporaryDirectory


@dataclass(frozen=True)
class Found:
    """The parts of a checkpoint.

    Attributes:
        name: for people.
        trees: the tree and folder name that each part is from.
        classes: class name of each part.
        index: `model_index.json`.
        file: the single file that the checkpoint is, None of a folder.
        unpacked: the single files that parts are from.
        guesses: sentences about what no file says.
    """

    name: str
    trees: dict[str, tuple[Tree, str]]
    classes: dict[str, str]
    index: dict[str, Any]
    file: Path | None = None
    unpacked: tuple[Unpacked, ...] = ()
    guesses: list[str] = field(default_factory=list)

    @property
    def revisions(self) -> dict[str, str]:
        return dict({place.hub for place, _ in self.trees.values() if place.hub})

    @property
    def folders(self) -> dict[str, Path]:
        return {part: place.folder / folder for part, (place, folder) in self.trees.items()}


def find_parts(source: Source, keep_bert: bool, prediction_type: str | None = None) -> Found:
    """Finds every part, and checks that each is of a class that can be exported.

    Args:
        source, keep_bert: as in `open_checkpoint`.
        prediction_type: of the UNet in a single file; None guesses it.

    Raises:
        CheckpointError: a part is missing, or is not one that can be exported.
    """
    root, tree = _open_root(source, prediction_type)
    file = tree.folder / "model_index.json"
    if "model_index.json" not in tree.names:
        raise CheckpointError(_no_index(tree))
    index = read_json(file)
    names, classes = _read_index(index, file)
    trees = {part: (tree, names[part]) for part in names}
    found = replace(root, trees=trees, classes=classes, index=index)
    if source.bert is not None and not (keep_bert and classes.get("bert")):
        other = open_tree(source.bert, source.bert_revision, what="--bert")
        for part in FORMER:
            trees[part], classes[part] = (other, ""), "AutoModel"
    if source.vae is not None:
        found = _with_vae(found, source.vae)
    if source.tokenizer is not None:
        other = open_tree(source.tokenizer, what="--tokenizer")
        place = "tokenizer" if other.within("tokenizer") else ""
        trees["tokenizer"], classes["tokenizer"] = (other, place), "CLIPTokenizer"
        if other.within("tokenizer_2"):
            trees["tokenizer_2"], classes["tokenizer_2"] = (other, "tokenizer_2"), "CLIPTokenizer"
    _leave_out_optional(trees, classes)
    if index.get("_class_name") == TWO_TOWERS and "text_encoder_2" not in classes:
        raise CheckpointError(_lacks(source, "text_encoder_2", ""))
    for part, (place, folder) in trees.items():
        if part not in classes or not (place.folder / folder).is_dir():
            raise CheckpointError(_lacks(source, part, folder))
        _check_part(part, place, folder, classes)
    _check_variant(source, trees)
    return found


def _no_index(tree: Tree) -> str:
    """That a folder is no checkpoint, and what in it may be the one that was meant."""
    text = f"checkpoint {tree.folder} has no model_index.json: not diffusers layout"
    places = ("..", "*", "snapshots/*")  # around a part, and in the cache of the hub
    found = [file for place in places for file in tree.folder.glob(f"{place}/model_index.json")]
    if found:
        return f"{text}; {found[0].resolve().parent} has one, give that folder"
    files = [name for name in tree.within("") if name.lower().endswith(SUFFIX)]
    if files and tree.hub is None and "config.json" not in tree.names:
        return f"{text}; a single file is given by its name, as {tree.folder / files[0]}"
    return text


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


def _open_root(source: Source, prediction_type: str | None) -> tuple[Found, Tree]:
    path = Path(source.checkpoint).expanduser()
    if not path.is_file() or path.suffix.lower() != SUFFIX:
        tree = open_tree(source.checkpoint, source.revision, source.subfolder)
        # A link's own name, not its target's.
        return Found(Path(os.path.abspath(path)).name, {}, {}, {}), tree
    from export.single_file import unpack

    if source.tokenizer is None:
        text = f"{path} is a single file, which has no tokenizer"
        raise CheckpointError(
            f"{text}: --tokenizer names a folder with CLIP's vocab.json and merges.txt"
        )
    scratch = _scratch(path)
    elsewhere = () if source.vae is None else ("vae",)
    with refusing(path):
        guesses = unpack(path, Path(scratch.name), PIPELINES, elsewhere, prediction_type)
    unpacked = (Unpacked(path, scratch),)
    return Found(path.stem, {}, {}, {}, path, unpacked, guesses), open_tree(scratch.name)


def _scratch(file: Path) -> tempfile.TemporaryDirectory:
    """A folder with room for what a file holds."""
    from export.resources import check_disk

    check_disk(Path(tempfile.gettempdir()), file.stat().st_size)
    return tempfile.TemporaryDirectory(prefix="twinbrush-")


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


def _with_vae(found: Found, place: str) -> Found:
    """With the autoencoder of a file, of a folder of its own, or of another checkpoint."""
    path, unpacked, guesses = Path(place).expanduser(), (), []
    if path.is_file() and path.suffix.lower() == SUFFIX:
        settings, guesses = _settings(found, path)
        scratch = _scratch(path)
        unpack_vae(path, Path(scratch.name) / "vae", settings)
        unpacked, place = (Unpacked(path, scratch),), scratch.name
    tree = open_tree(place, what="--vae")
    folder = "" if "config.json" in tree.names else "vae"
    if f"{folder}/config.json".lstrip("/") not in tree.names:
        raise CheckpointError(f"--vae {place} has no config.json, at its top or in vae/")
    file = tree.folder / folder / "config.json"
    name = read_json(file).get("_class_name")
    if not isinstance(name, str):
        raise CheckpointError(f"{file} has _class_name {name!r}: it does not say its class")
    found.trees["vae"], found.classes["vae"] = (tree, folder), name
    return replace(found, unpacked=found.unpacked + unpacked, guesses=[*found.guesses, *guesses])


def _settings(found: Found, file: Path) -> tuple[dict[str, Any], list[str]]:
    """What the file of an autoencoder does not say, and what of it is a guess."""
    if file.with_name("config.json").is_file():
        return {}, []
    xl = found.index.get("_class_name") == "StableDiffusionXLPipeline"
    settings: dict[str, Any] = {"scaling_factor": SCALING_XL if xl else SCALING}
    tree, folder = found.trees["vae"]
    own = tree.folder / folder / "config.json"
    if found.classes.get("vae") == CLASS and own.is_file():
        settings = read_json(own)
    factor = settings.get("scaling_factor", SCALING)
    return settings, [f"scaling_factor {factor} of {file.name}, as of the checkpoint's own VAE"]


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
        text = f"{folder} is a {classes[part]}, which cannot be exported"
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
