"""Loads the torch module of one part of a checkpoint. Knows nothing of what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import ModelMixin
from safetensors import safe_open
from torch import Tensor

from networks.pruned import build_unset, load_pruned, pruning_of

READ_AT_ONCE = 64  # tensors of a file that is mapped into memory


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says which part and why."""


def first_line(error: Exception) -> str:
    """The message of a library's error, without its advice."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def not_finite(folder: Path, tensor: str) -> CheckpointError:
    """The error of weights with infinities or NaN."""
    text = f"{folder} has numbers in {tensor} that are not finite"
    return CheckpointError(f"{text}: its training failed, or its file is damaged")


def check_missing(folder: Path, missing: Iterable[str], unused: tuple[str, ...] = ()) -> None:
    """Raises CheckpointError where tensors are missing that are used."""
    # A pooler makes one vector of a text, which nothing here asks for.
    names = sorted(n for n in missing if "pooler" not in n and not n.startswith(unused))
    if names:
        raise CheckpointError(
            f"{folder} lacks {len(names)} of its tensors, {names[0]} first: download it again"
        )


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


def hollow_part(folder: Path, model_class: Any, **options: Any) -> Any:
    """The module that `load_part` gives, without memory for its weights.

    Raises:
        CheckpointError: its configuration cannot be read.
    """
    with refusing(folder), torch.device("meta"):
        return build_unset(folder, model_class, **options).eval()


def load_part(
    folder: Path,
    model_class: Any,
    files: Sequence[str] = (),
    unused: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """The torch module of a folder, in evaluation mode and FP32, as narrow as pruning left it.

    Args:
        folder: of the part.
        model_class: of the module.
        files: names of the weight files of a module of diffusers; by default all safetensors.
        unused: beginnings of the names of tensors that may be missing, and then have no values.
        options: for a class of transformers, whose files are chosen by `variant` among them.

    Raises:
        CheckpointError: its weights do not fit the class, some are missing, or not finite.
    """
    transformers.utils.logging.disable_progress_bar()  # it would cut through the command's own
    with refusing(folder):
        if pruning_of(folder):
            model, missing = load_pruned(folder, model_class, **options), []
        elif issubclass(model_class, ModelMixin):
            model, missing = _load_diffusers(folder, model_class, files)
        else:
            model, found = model_class.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **options
            )
            missing = found["missing_keys"]
    check_missing(folder, missing, unused)
    for name, tensor in model.named_parameters():
        if not name.startswith(unused) and not torch.isfinite(tensor).all():
            raise not_finite(folder, name)
    return model.float().eval()


def _load_diffusers(
    folder: Path, model_class: Any, files: Sequence[str]
) -> tuple[ModelMixin, list[str]]:
    """A module of diffusers in FP32, and the names of tensors that no file has.

    Its own `from_pretrained` holds the weights of files and of module side by side, and does not
    know former names of tensors in shards.
    """
    with torch.device("meta"):
        model = model_class.from_config(model_class.load_config(folder))
    paths = [folder / name for name in files] or sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor for path in paths for name, tensor in _read(path)}
    model._fix_state_dict_keys_on_load(tensors)
    found = model.load_state_dict(tensors, strict=False, assign=True)
    return model, found.missing_keys


def _read(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file in FP32, by name; few of its pages are in memory at a time."""
    with safe_open(file, "pt") as stored:
        names = list(stored.keys())
    for start in range(0, len(names), READ_AT_ONCE):
        with safe_open(file, "pt") as stored:
            for name in names[start : start + READ_AT_ONCE]:
                tensor = stored.get_tensor(name)
                yield (
                    name,
                    tensor.to(torch.float32, copy=True)
                    if tensor.is_floating_point()
                    else tensor.clone(),
                )
