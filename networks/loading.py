"""Loads the torch module of one part of a checkpoint. Knows nothing of what a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from diffusers import ModelMixin

from networks.pruned import load_pruned, pruning_of


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says which part and why."""


def load_part(folder: Path, model_class: Any, **options: Any) -> Any:
    """The torch module of a folder, in evaluation mode and FP32, as narrow as pruning left it.

    `options` go to the class.

    Raises:
        CheckpointError: its weights do not fit the class, or some are missing.
    """
    transformers.utils.logging.disable_progress_bar()  # it would cut through the command's own
    if issubclass(model_class, ModelMixin):
        options["low_cpu_mem_usage"] = False  # needs accelerate, and warns where that is missing
    try:
        if pruning_of(folder):
            model, missing = load_pruned(folder, model_class, **options), []
        else:
            model, found = model_class.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **options
            )
            # A pooler makes one vector of a text, which nothing here asks for.
            missing = sorted(key for key in found["missing_keys"] if "pooler" not in key)
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}") from error
    if missing:
        text = f"{folder} lacks {len(missing)} of its tensors, {missing[0]} first"
        raise CheckpointError(text)
    return model.float().eval()
