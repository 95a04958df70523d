"""Which weight files of a part are read: plain ones, variants and shards.

Reads the headers of safetensors, and never a weight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from export.source import PICKLES
from networks.loading import CheckpointError

STEMS = ("model", "diffusion_pytorch_model")  # of transformers and diffusers
NAME = re.compile(
    rf"(?:{'|'.join(STEMS)})(?:\.(?P<before>[\w]+))?(?:-\d{{5}}-of-(?P<of>\d{{5}}))?"
    r"(?:\.(?P<after>[\w]+))?\.safetensors"
)
INDEX = re.compile(rf"(?:{'|'.join(STEMS)})\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")
LFS = b"version https://git-lfs"
# Types of weights in safetensors that PyTorch makes FP32 of without a scale.
WEIGHT_TYPES = ("F16", "BF16", "F32", "F64")
NON_EMA = "non_ema"  # weights to train on from; never chosen by themselves


def choose_weights(
    names: Iterable[str], folder: Path, variant: str | None = None
) -> tuple[str | None, list[str]]:
    """The variant to read and its files.

    Args:
        names: of all files in the part's folder, downloaded or not.
        folder: the part's, for messages and for the index of shards.
        variant: the one to prefer; a part without it is read in its plain files.

    Raises:
        CheckpointError: there are no safetensors, several variants to choose from, or a shard is
            missing.
    """
    names = sorted(names)
    found: dict[str | None, list[str]] = {}
    for name in names:
        if match := NAME.fullmatch(name):
            found.setdefault(match["before"] or match["after"], []).append(name)
    # The index alone says that there should be weights.
    for name in names:
        if match := INDEX.fullmatch(name):
            found.setdefault(match["variant"], [])
    if not found:
        raise CheckpointError(_no_weights(names, folder))
    choice = _choose(found, folder, variant)
    return choice, _whole(found[choice], names, folder, choice)


def variant_of(name: str) -> str | None:
    """The variant that a weight file is named after; None of a plain or unknown one."""
    match = NAME.fullmatch(name)
    return match and (match["before"] or match["after"])


def variants_of(names: Iterable[str]) -> set[str]:
    """The variants that files are named after."""
    return {variant for name in names if (variant := variant_of(name))}


def _choose(found: dict[str | None, list[str]], folder: Path, wanted: str | None) -> str | None:
    if wanted in found:
        return wanted
    if None in found:
        return None
    usable = [name for name in found if name != NON_EMA]
    if len(usable) == 1 and wanted is None:
        return usable[0]
    have = ", ".join(sorted(str(name) for name in found))
    if wanted is not None:
        raise CheckpointError(f"{folder} has no weights of --variant {wanted}: it has {have}")
    raise CheckpointError(f"{folder} has only variants of its weights, {have}: choose a --variant")


def _no_weights(names: list[str], folder: Path) -> str:
    if pickles := [name for name in names if name.lower().endswith(PICKLES)]:
        return (
            f"{folder} has no safetensors; {pickles[0]} is a pickle, which can run code and is not"
            " read: save the part again with safe_serialization=True"
        )
    if others := [name for name in names if name.lower().endswith(".safetensors")]:
        expected = " or ".join(f"{stem}.safetensors" for stem in STEMS)
        return f"{folder} has no safetensors of a known name but {others[0]}: rename it {expected}"
    return f"{folder} has no safetensors: its weights are missing, download the part again"


def _whole(files: list[str], names: list[str], folder: Path, variant: str | None) -> list[str]:
    """The single file, or all shards of the index."""
    single = [name for name in files if not NAME.fullmatch(name)["of"]]
    if single:
        return single[:1]
    indexes = [n for n in names if (m := INDEX.fullmatch(n)) and m["variant"] == variant]
    if not indexes:
        raise CheckpointError(
            f"{folder} has shards and no index: download its .safetensors.index.json too"
        )
    content = read_json(folder / indexes[0])
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
        raise CheckpointError(f"{folder / indexes[0]} is no index of shards: it has no weight_map")
    shards = sorted(set(shards.values()))
    if missing := [shard for shard in shards if shard not in names]:
        raise CheckpointError(
            f"{folder} lacks the shard {missing[0]}, which {indexes[0]} names: download it too"
        )
    return shards


def read_header(file: Path) -> dict[str, Any]:
    """Types, shapes and places of the tensors in a safetensors file, by name.

    Raises:
        CheckpointError: it is a Git LFS pointer, a pickle, cut short or no safetensors.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            if LFS.startswith(start) and start:
                raise CheckpointError(lfs_pointer(file))
            length = int.from_bytes(start, "little")
            pickled = start.startswith((b"PK\x03\x04", b"\x80\x02"))
            if pickled and stream.read(1) != b"{":
                text = f"{file} is a pickle under another name, which is not read"
                raise CheckpointError(f"{text}: convert it to safetensors")
            if size < 8 or 8 + length > size:
                text = f"{file} is cut short at {size} bytes or is no safetensors file"
                raise CheckpointError(f"{text}: download it again")
            stream.seek(8)
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except (
        ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError,
    ) as error:  # fmt: skip
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} is no safetensors file: download it again") from error
    if size != 8 + length + end:
        text = f"{file} is cut short: it has {size} bytes of {8 + length + end}"
        raise CheckpointError(f"{text}: download it again")
    return header


def lfs_pointer(file: Path) -> str:
    return f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull`"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; none of its numbers is NaN.

    Raises:
        CheckpointError: the file is missing, unreadable or something else.
    """

    try:
        text = file.read_text()
        if text.startswith(LFS.decode()):
            raise CheckpointError(lfs_pointer(file))
        content = json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is not there") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError(f"{file} is not JSON: it is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    for name, value in content.items():
        if _has_nan(value):
            raise CheckpointError(f"{file}: {name} is NaN, which is no number")
    return content


def _has_nan(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_nan, value.values()))
    if isinstance(value, list):
        return any(map(_has_nan, value))
    return value != value
