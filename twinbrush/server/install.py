"""Which Triton server this machine has, and how it must be started."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

OPT = Path("/opt/tritonserver")
BACKENDS = Path(__file__).resolve().parents[2] / "backends"
# What a Python-based backend needs beside its model.py; links are refused by the server.
PYTHON_BACKEND_FILES = (
    "libtriton_python.so", "triton_python_backend_stub", "triton_python_backend_utils.py",
)  # fmt: skip


class NoTriton(Exception):
    """No Triton server is installed."""


@dataclass(frozen=True)
class Triton:
    """An installed server.

    Attributes:
        binary: the `tritonserver` executable.
        backends: its backend folder.
        description: for people.
        environment: variables that it needs on top of this process's.
        stub: the Python stub for this interpreter, where the backend folder has none.
        development: whether it is too old for networks that others reach.
    """

    binary: Path
    backends: Path
    description: str
    environment: dict[str, str] = field(default_factory=dict)
    stub: Path | None = None
    development: bool = False

    def prepare_backends(self, scratch: Path) -> Path:
        """A backend folder that has ONNX Runtime.

        Where the server brings its own, that is its own folder. Else one is put together in
        `scratch`, with this project's Python-based `onnxruntime` backend.
        """
        if (self.backends / "onnxruntime").is_dir():
            return self.backends
        python = scratch / "python"
        shutil.copytree(self.backends / "python", python)
        if self.stub is not None:
            shutil.copy2(self.stub, python / "triton_python_backend_stub")
        onnxruntime = scratch / "onnxruntime"
        onnxruntime.mkdir()
        for name in PYTHON_BACKEND_FILES:
            shutil.copy2(python / name, onnxruntime / name)
        shutil.copy2(BACKENDS / "onnxruntime" / "model.py", onnxruntime / "model.py")
        return scratch


def find_triton() -> Triton:
    """The server in `/opt/tritonserver`, else the one of the pytriton wheel.

    Raises:
        NoTriton: neither is there; the message says how to get one.
    """
    binary = OPT / "bin" / "tritonserver"
    if binary.is_file():
        return Triton(binary, OPT / "backends", f"the Triton server of {OPT}")
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise NoTriton(
            f"no Triton server: neither {OPT} nor the package nvidia-pytriton is installed"
        )
    wheel = Path(spec.submodule_search_locations[0])
    root = wheel / "tritonserver"
    # The server's embedded interpreter takes its packages from the first python3 on PATH.
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH') or os.defpath}"
    libraries = [sysconfig.get_config_var("LIBDIR"), str(wheel.parent / "nvidia_pytriton.libs")]
    if existing := os.environ.get("LD_LIBRARY_PATH"):
        libraries.append(existing)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    version = importlib.metadata.version("nvidia-pytriton")
    return Triton(
        root / "bin" / "tritonserver",
        root / "backends",
        f"the Triton server of nvidia-pytriton {version} (for development, on loopback)",
        {"LD_LIBRARY_PATH": ":".join(libraries), "PATH": path},
        root / "python_backend_stubs" / python / "triton_python_backend_stub",
        development=True,
    )
