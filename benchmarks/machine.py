"""Result files, and what they say of the machine and the tools that made them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
from pathlib import Path

from twinbrush.server.plans import gpu

TOOLS = (
    "numpy", "torch", "diffusers", "transformers", "onnxruntime", "nvidia-pytriton",
    "tritonclient", "tokenizers", "pillow",
)  # fmt: skip
PLACES = ("--out", "--folder", "--repository")  # options that name a path of this machine


def describe() -> dict[str, object]:
    """Processor, memory, GPU, system and versions."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9),
        "gpu": gpu(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "tools": {name: _version(name) for name in TOOLS},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_result(out: Path, command: str, **parts: object) -> None:
    """Writes a result file that names the command, with its options, and the machine.

    Options that name places on this machine are left out.
    """
    options, place = [], False
    for word in sys.argv[1:]:
        if not place and word.partition("=")[0] not in PLACES:
            options.append(word)
        place = word in PLACES
    result = {"command": " ".join([command, *options]), "machine": describe(), **parts}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
