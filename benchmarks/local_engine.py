"""The serving engine in this process, over the files and settings of a model repository."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from twinbrush.engine.config import ENGINE
from twinbrush.engine.denoise import Models
from twinbrush.engine.engine import Engine
from twinbrush.runtimes.onnx_runtime import read_config

console = Console()


@contextmanager
def local_engine(repository: Path, models: Models, **options: Any) -> Iterator[Engine]:
    """An engine that is closed on leaving; `options` are those of its class.

    Ends the command with a sentence where the repository is not exported.
    """
    try:
        config = read_config(repository / ENGINE.parent / "config.pbtxt")
        engine = Engine.of_model(repository / ENGINE, config, models, **options)
    except (OSError, ValueError) as error:
        sys.exit(f"error: --repository: {error}")
    try:
        yield engine
    finally:
        engine.close()
