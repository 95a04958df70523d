"""Opening a checkpoint in diffusers layout: what must be there, and what is refused.

A source is a folder or a hub id. Only safetensors are read; nothing here runs code that a
checkpoint brings.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub

from networks.loading import CheckpointError, load_part
from networks.pruned import pruning_of

# Classes that each part may be of; None is any text model that transformers knows.
PARTS = {
    "text_encoder": ("CLIPTextModel",),
    "bert": None,
    "fusion": ("FusionHead",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("VQModel", "AutoencoderKL"),
}
OTHERS = ("tokenizer", "bert_tokenizer", "scheduler")
# Files of which a tokenizer has at least one; without, transformers makes an empty one.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")
BERT_PARTS = ("bert", "bert_tokenizer")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Of a hub repository: no pickles, no second copies of the weights, no single-file checkpoints.
PIPELINE_FILES = ["model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]
BERT_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
UNUSED_FILES = ["*.fp16.*", "*.non_ema.*", "safety_checker/*", "onnx/*"]


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint.

    Attributes:
        name: for people.
        revisions: commit of each source that came from the hub, by hub id.
        folders: where each part is; `fusion` may be missing, and then starts as the identity.
        classes: class name of each part.
        index: `model_index.json`.
    """

    name: str
    revisions: dict[str, str]
    folders: dict[str, Path]
    classes: dict[str, str]
    index: dict[str, Any]

    def config(self, part: str) -> dict[str, Any]:
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        return _json_object(self.folders[part] / name)

    def load(self, part: str, model_class: Any, **options: Any) -> Any:
        """The part's torch module: see `load_part`."""
        return load_part(self.folders[part], model_class, **options)


def open_checkpoint(
    source: str | Path,
    bert: str | Path | None = None,
    revision: str | None = None,
    bert_revision: str | None = None,
    keep_bert: bool = False,
) -> Checkpoint:
    """Checks that a checkpoint has every part, each of a class that can be exported.

    Args:
        source: folder or hub id of a checkpoint in diffusers layout.
        bert: folder or hub id of a text model and its tokenizer, for `bert` and
            `bert_tokenizer`; without a fusion head of its own the checkpoint gets a new one.
        revision, bert_revision: commit, tag or branch, of hub ids.
        keep_bert: takes `bert` only where the checkpoint has no text model of its own.

    Raises:
        CheckpointError: with the first thing that is wrong.
    """
    folder = _fetch(source, revision, PIPELINE_FILES)
    index = _index(folder)
    folders = {part: folder / part for part in (*PARTS, *OTHERS)}
    classes = {
        part: entry[1]
        for part in folders
        if isinstance(entry := index.get(part), list) and len(entry) == 2
    }
    if keep_bert and classes.get("bert"):
        bert = None
    sources = {str(source): folder}
    if bert is not None:
        bert_folder = sources[str(bert)] = _fetch(bert, bert_revision, BERT_FILES)
        for part in BERT_PARTS:
            folders[part], classes[part] = bert_folder, "AutoModel"
    if "fusion" not in classes and bert is not None:
        del folders["fusion"]
    for part, place in folders.items():
        if part not in classes or not place.is_dir():
            hint = "; --bert names a text model to take" if part in BERT_PARTS else ""
            raise CheckpointError(f"checkpoint {source} lacks its part {part}/{hint}")
        if part in PARTS:
            _check_part(part, place, classes[part])
        elif part == "scheduler":
            _json_object(place / "scheduler_config.json")
        elif not any(file for name in VOCABULARIES for file in place.glob(name)):
            raise CheckpointError(f"{place} has no vocabulary: one of {', '.join(VOCABULARIES)}")
    revisions = {name: place.name for name, place in sources.items() if not Path(name).is_dir()}
    return Checkpoint(Path(source).resolve().name, revisions, folders, classes, index)


def _fetch(source: str | Path, revision: str | None, files: list[str]) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(str(source)):
        raise CheckpointError(f"checkpoint {source} is not there")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                str(source), revision=revision, allow_patterns=files, ignore_patterns=UNUSED_FILES
            )
        )
    except Exception as error:
        text = f"{source} is not a folder, and the hub did not give it: {first_line(error)}"
        raise CheckpointError(text) from error


def first_line(error: Exception) -> str:
    """What an error of a library says, without its advice."""
    return str(error).strip().partition("\n")[0]


def _index(folder: Path) -> dict[str, Any]:
    file = folder / "model_index.json"
    if not file.is_file():
        raise CheckpointError(f"checkpoint {folder} has no model_index.json: not diffusers layout")
    return _json_object(file)


def _json_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{file} is not there") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return content


def _check_part(part: str, folder: Path, name: str) -> None:
    allowed = PARTS[part]
    if allowed is not None and name not in allowed:
        either = " or ".join(allowed)
        raise CheckpointError(f"{part} is a {name}, which cannot be exported: {either} can")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json")
    _json_object(folder / "config.json")
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} has no safetensors; other formats are not read")
    try:
        pruning_of(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
