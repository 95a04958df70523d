"""Opening a checkpoint in diffusers layout: what must be there, and what is refused.

Only safetensors are read; nothing here runs code that a checkpoint brings.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Classes that each part may be of.
PARTS = {
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("BertModel",),
    "fusion": ("FusionHead",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("VQModel", "AutoencoderKL"),
}
OTHERS = ("tokenizer", "tokenizer_2", "scheduler")


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says which part and why."""


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint folder.

    Attributes:
        folder: where it is.
        classes: class name of each part, from `model_index.json`.
    """

    folder: Path
    classes: dict[str, str]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def config(self, part: str) -> dict[str, Any]:
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        return json.loads((self.folder / part / name).read_text())

    def load(self, part: str, model_class: Any, **options: Any) -> Any:
        """The part's torch module, in evaluation mode and FP32.

        `options` go to the class.

        Raises:
            CheckpointError: its weights do not fit the class.
        """
        try:
            model = model_class.from_pretrained(self.folder / part, use_safetensors=True, **options)
        except Exception as error:
            raise CheckpointError(f"{self.folder / part} cannot be loaded: {error}") from error
        return model.float().eval()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Checks that a folder holds every part, each of a class that can be exported.

    Raises:
        CheckpointError: with the first thing that is wrong.
    """
    index = folder / "model_index.json"
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder} is not there")
    if not index.is_file():
        raise CheckpointError(f"checkpoint {folder} has no model_index.json: not diffusers layout")
    try:
        listed = json.loads(index.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{index} is not JSON: {error}") from error
    classes = {}
    for part in (*PARTS, *OTHERS):
        entry = listed.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or not (folder / part).is_dir():
            raise CheckpointError(f"checkpoint {folder} lacks its part {part}/")
        classes[part] = entry[1]
    for part, allowed in PARTS.items():
        if classes[part] not in allowed:
            raise CheckpointError(
                f"{part} is a {classes[part]}, which cannot be exported: {' or '.join(allowed)} can"
            )
        if not (folder / part / "config.json").is_file():
            raise CheckpointError(f"{folder / part} has no config.json")
        if not any((folder / part).glob("*.safetensors")):
            raise CheckpointError(f"{folder / part} has no safetensors; other formats are not read")
    return Checkpoint(folder, classes)
