"""Whether this machine has the memory and disk for an export, asked before it starts.

Knows the sizes of weights from the headers of safetensors, without reading them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from math import prod
from pathlib import Path

from export.precision import Precision
from export.weights import variant_of

BASE_BYTES = 1.5e9  # the interpreter with torch, transformers and ONNX Runtime
CONVERSION_BYTES = 4.6  # of each weight of the model in conversion, which is loaded in FP32
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


class ResourceError(RuntimeError):
    """The machine has not enough memory or disk; the message says how much is needed."""


def check_resources(
    built: Iterable[Path],
    repository: Path,
    precision: Precision,
    together: Iterable[Path] = (),
) -> None:
    """Holds what an export needs against what is free.

    Args:
        built: folders of the parts that are converted one after the other and written.
        repository: that is written.
        precision: of what is written.
        together: folders of the parts that are in memory at one time before.

    Raises:
        ResourceError: there is not enough disk or memory.
    """
    converted = [weight_count(folder) for folder in built]
    check_disk(repository, sum(converted) * precision.bytes)
    most = max(max(converted, default=0), sum(map(weight_count, together)))
    memory = BASE_BYTES + most * CONVERSION_BYTES
    free = free_memory()
    if memory > free:
        raise ResourceError(f"not enough memory: {_needs(memory, free)}")


def check_disk(folder: Path, needed: float) -> None:
    """Raises ResourceError where a folder's disk has not `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(f"not enough disk at {folder}: {_needs(needed, free)}")


def _needs(needed: float, free: float) -> str:
    return f"the export needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def weight_count(folder: Path) -> int:
    """Numbers in the safetensors of a folder; of several variants, those of the largest."""
    counts: dict[str | None, int] = {}
    for file in folder.glob("*.safetensors"):
        variant = variant_of(file.name)
        tensors = (tensor for name, tensor in _header(file).items() if name != "__metadata__")
        counts[variant] = counts.get(variant, 0) + sum(prod(t["shape"]) for t in tensors)
    return max(counts.values(), default=0)


def _header(file: Path) -> dict:
    """What a safetensors file says of its tensors; nothing of one that cannot be read."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            return json.loads(stream.read(min(size, file.stat().st_size)))
    except (OSError, ValueError):
        return {}  # loading it says what is wrong


def free_memory() -> int:
    """Bytes that this process may still take, by the machine and by its control group."""
    available = re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text())
    free = [int(available[1]) * 1024] if available else []
    limit, used, stat = (CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if limit.is_file() and (most := limit.read_text().strip()) != "max":
        # The page cache of files that nothing uses counts as used, and goes when it is asked to.
        dropped = re.search(r"^inactive_file (\d+)$", stat.read_text(), re.MULTILINE)
        free.append(int(most) - int(used.read_text()) + int(dropped[1] if dropped else 0))
    return min(free)
