"""The serving engine in this process, over the files of a model repository."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twinbrush.config import PipelineConfig
from twinbrush.denoise import Models
from twinbrush.engine import Engine
from twinbrush.prompt import PromptTokenizer


@contextmanager
def local_engine(repository: Path, models: Models, max_rows: int = 16) -> Iterator[Engine]:
    """An engine that is closed on leaving."""
    folder = repository / "text_to_image_stream" / "1"
    config = PipelineConfig.load(folder / "pipeline.json")
    engine = Engine(models, config, PromptTokenizer(folder, config), max_rows=max_rows)
    try:
        yield engine
    finally:
        engine.close()
