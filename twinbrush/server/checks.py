"""What can be known to fail before a server starts, each with a sentence on what to do."""

from __future__ import annotations

import ctypes
import glob
import os
import shutil
import sys
from pathlib import Path

from twinbrush.engine.config import ENGINE, PipelineConfig, read_parameters
from twinbrush.runtime_choice import Runtime, configured_runtime
from twinbrush.server import plans
from twinbrush.server.addresses import is_loopback
from twinbrush.server.errors import ServerError
from twinbrush.server.scratch import SHARED_MEMORY

TMP = Path("/tmp")  # the Python backend creates its folders here, whatever TMPDIR is
STUB_BYTES = 2 << 20  # shared memory of a stub: what it starts with, and what it grows by
# Of a picture, while it passes through shared memory: the decoder's three channels of FP32 in the
# decoder's region and in the engine's, and the answer, at most its pixels, in both front doors'.
BYTES_A_PIXEL = 2 * 3 * 4 + 2 * 3


def check_door(address: str, development: bool, insecure: bool) -> None:
    """Refuses to open an old server to the network.

    Raises:
        ServerError: `address` is not loopback, the server is for development, and not `insecure`.
    """
    if development and not insecure and not is_loopback(address):
        text = (
            f"--address {address} would open the development server to the network: its Triton is "
            "old, with known vulnerabilities. Serve in NVIDIA's container, or listen on 127.0.0.1, "
            "or accept the risk with --insecure-development-server"
        )
        raise ServerError(text, worth_another_try=False)


def check_runtime(
    repository: Path, config_name: str | None, asked: Runtime | None, expose_networks: bool
) -> Runtime:
    """Where the networks are to run: as `asked`, else by the engine's `config.pbtxt`.

    Raises:
        ServerError: that file has another value, or an option does not go with `in_process`.
    """
    config = plans.engine_config(repository) if config_name == plans.CONFIG_NAME else None
    config = config or repository / ENGINE.parent / "config.pbtxt"
    try:
        runtime = asked or configured_runtime(read_parameters(config))
    except OSError:
        runtime = Runtime.SERVED  # the server says what the repository lacks
    except ValueError as error:
        raise ServerError(f"{config}: {error}", worth_another_try=False) from None
    if runtime == Runtime.IN_PROCESS:
        refused = {"--config-name": config_name, "--expose-networks": expose_networks}
        if options := [name for name, value in refused.items() if value]:
            text = f"{' and '.join(options)} cannot be used with runtime in_process: the server"
            text += " loads no networks then; the engine reads their config.pbtxt and ONNX files"
            raise ServerError(text, worth_another_try=False)
    return runtime


def check_config_name(repository: Path, name: str | None) -> None:
    """Raises ServerError where no model has a configuration of that name."""
    if name is not None and not any(repository.glob(f"*/configs/{glob.escape(name)}.pbtxt")):
        text = f"--config-name {name}: no model of {repository} has configs/{name}.pbtxt"
        raise ServerError(text, worth_another_try=False)


def check_temporary_folder(folder: Path = TMP) -> None:
    """Raises ServerError where Triton's Python backend cannot create its folders."""
    if not os.access(folder, os.W_OK | os.X_OK):
        text = f"{folder} is missing or not writable, and Triton's Python backend needs it"
        raise ServerError(f"{text}: mount one, as with `docker run --tmpfs {folder}`", False)


def check_libpython(folders: str) -> None:
    """Raises ServerError where the stubs would not find the shared library of this Python.

    Args:
        folders: an LD_LIBRARY_PATH.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    name = f"libpython{version}.so.1.0"
    if any((Path(folder) / name).is_file() for folder in folders.split(":") if folder):
        return
    try:
        ctypes.CDLL(name)
    except OSError:
        text = f"Triton's Python stubs need {name}, which this Python lacks: install the package"
        text += f" libpython{version} (Debian, Ubuntu), or use a Python built with --enable-shared"
        raise ServerError(text, worth_another_try=False) from None


def check_shared_memory(repository: Path, stubs: int, free: int | None = None) -> str | None:
    """Compares the free shared memory with what the models can need.

    Returns a warning where pictures of the largest size do not fit.

    Raises:
        ServerError: the server cannot start, or no picture of the native size can be answered.
    """
    if free is None:
        if SHARED_MEMORY.is_dir() and not os.access(SHARED_MEMORY, os.W_OK | os.X_OK):
            text = f"{SHARED_MEMORY} is not writable for this user, and Triton's Python stubs need"
            raise ServerError(f"{text} it: mount a tmpfs there with mode 1777", False)
        free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    least = most = stubs * STUB_BYTES
    sides = picture_sides(repository)
    if sides is not None:
        native, largest = sides
        least += BYTES_A_PIXEL * native**2
        most += BYTES_A_PIXEL * largest**2
    needed = f"{SHARED_MEMORY} has {free >> 20} MB free and {stubs} Python stubs"
    remedy = "give the container more, as with `docker run --shm-size=1g`"
    if free < least:
        text = f"{needed} need {_megabytes(least)} MB"
        raise ServerError(f"{text}: {remedy}", worth_another_try=False)
    if sides is not None and free < most:
        size = f"{sides[1]}x{sides[1]}"
        return f"{needed} with a picture of {size} need {_megabytes(most)} MB: {remedy}"
    return None


def picture_sides(repository: Path) -> tuple[int, int] | None:
    """Native and largest side of pictures, in pixels; None where the repository has no engine."""
    try:
        config = PipelineConfig.load(repository / "text_to_image_stream" / "1" / "pipeline.json")
    except (OSError, ValueError):
        return None  # the engine says why when it starts
    return config.native_side, config.max_side


def _megabytes(size: int) -> int:
    return -(-size // (1 << 20))
