"""Loads the torch module of one part of a checkpoint. Knows nothing of what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import ModelMixin

from networks.pruned import load_pruned, pruning_of


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says which part and why."""


def first_line(error: Exception) -> str:
    """The message of a library's error, without its advice."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def refusing(what: object) -> Iterator[None]:
    """Makes one sentence of whatever reading `what`, a file or folder, raises.

    Raises:
        CheckpointError: anything went wrong; the first line of a library's message is its reason.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        text = f"{what} cannot be used: {first_line(error)} ({type(error).__name__})"
        raise CheckpointError(f"{text}; download it again, or correct it") from error


def load_part(folder: Path, model_class: Any, **options: Any) -> Any:
    """The torch module of a folder, in evaluation mode and FP32, as narrow as pruning left it.

    `options` go to the class.

    Raises:
        CheckpointError: its weights do not fit the class, some are missing, or not finite.
    """
    transformers.utils.logging.disable_progress_bar()  # it would cut through the command's own
    if issubclass(model_class, ModelMixin):
        options["low_cpu_mem_usage"] = False  # needs accelerate, and warns where that is missing
    with refusing(folder):
        if pruning_of(folder):
            model, missing = load_pruned(folder, model_class, **options), []
        else:
            model, found = model_class.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **options
            )
            # A pooler makes one vector of a text, which nothing here asks for.
            missing = sorted(key for key in found["missing_keys"] if "pooler" not in key)
    if missing:
        text = f"{folder} lacks {len(missing)} of its tensors, {missing[0]} first"
        raise CheckpointError(text)
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            text = f"{folder} has numbers in {name} that are not finite"
            raise CheckpointError(f"{text}: its training failed, or its file is damaged")
    return model.float().eval()
