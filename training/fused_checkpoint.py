"""A checkpoint folder with a trained fusion head: frozen parts linked or copied, the head written.

Knows nothing of training.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from export.checkpoint import Checkpoint
from networks.fusion_head import FusionHead
from training.data import BadInput
from training.run import save_part

# Files of the text model's folder; AutoTokenizer needs its config.json too.
MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
NO_TOKENIZER_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.h5", "*.msgpack",
                      "*.onnx", "*.ot")  # fmt: skip
OWN = ("fusion", "bert", "bert_tokenizer")


def check_out(out: Path) -> None:
    """Raises BadInput if a checkpoint cannot be written to `out`."""
    if out.exists():
        raise BadInput(f"--out: {out} exists: name a folder that does not")


def write_checkpoint(opened: Checkpoint, head: FusionHead, out: Path, copy: bool = False) -> None:
    """Writes a checkpoint with the parts of `opened` and a fusion head, whole or not at all.

    Args:
        copy: copies the frozen parts; otherwise they are links to where they are.

    Raises:
        OSError: the folder cannot be written.
    """
    made = out.with_name(f"{out.name}.part")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    index = dict(opened.index)
    for name, folder in _frozen_folders(opened).items():
        _take(folder, made / name, copy)
    _take_text_model(opened, made, copy)
    save_part(head, made / "fusion")
    index |= {
        "bert": ["transformers", _model_class(opened.folders["bert"])],
        "bert_tokenizer": ["transformers", _tokenizer_class(opened.folders["bert_tokenizer"])],
        "fusion": ["networks.fusion_head", "FusionHead"],
    }
    (made / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    os.replace(made, out)


def _frozen_folders(opened: Checkpoint) -> dict[str, Path]:
    """Every folder of the checkpoint, by name, but those of the head and the text model."""
    root = opened.folders["unet"].parent
    folders = {f.name: f for f in root.iterdir() if f.is_dir() and not f.name.startswith(".")}
    own = {opened.folders[part].resolve() for part in OWN if part in opened.folders}
    return {
        name: folder
        for name, folder in sorted((folders | opened.folders).items())
        if name not in OWN and folder.resolve() not in own
    }


def _take_text_model(opened: Checkpoint, made: Path, copy: bool) -> None:
    """The text model and its tokenizer, which may lie in one folder, in a folder each."""
    model, tokenizer = opened.folders["bert"], opened.folders["bert_tokenizer"]
    for name in ("bert", "bert_tokenizer"):
        (made / name).mkdir()
    for pattern in MODEL_FILES:
        for file in model.glob(pattern):
            _take(file, made / "bert" / file.name, copy)
    for file in filter(Path.is_file, tokenizer.iterdir()):
        if not any(file.match(pattern) for pattern in NO_TOKENIZER_FILES):
            _take(file, made / "bert_tokenizer" / file.name, copy)
    if (shapes := model / "shapes.json").exists():  # of a pruned model
        _take(shapes, made / "bert" / shapes.name, copy)


def _take(source: Path, target: Path, copy: bool) -> None:
    if not copy:
        target.symlink_to(source.resolve())
    elif source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)


def _model_class(folder: Path) -> str:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    name = MODEL_MAPPING_NAMES[config.model_type]
    return name if isinstance(name, str) else name[0]


def _tokenizer_class(folder: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    return type(tokenizer).__name__
