"""Building beside the repository that serves, and putting what was built in its place.

Nothing of the old repository is touched before everything new is built, so an export that
fails or is killed leaves it as it was.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twinbrush.manifest import NAME
from twinbrush.tensorrt import CONFIG_NAME, PLAN

PREFIX = ".building-"


@contextmanager
def staging(repository: Path) -> Iterator[Path]:
    """A folder on the repository's file system that is gone afterwards.

    Those that killed exports left are removed first.
    """
    for left in repository.parent.glob(f"{PREFIX}*"):
        if not Path("/proc", left.name.removeprefix(PREFIX).partition("-")[0]).exists():
            shutil.rmtree(left, ignore_errors=True)
    prefix = f"{PREFIX}{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=repository.parent) as scratch:
        yield Path(scratch)


def put_in_place(stage: Path, repository: Path) -> None:
    """Renames every staged file to its place, the manifest last; renames need no space.

    Where a new `model.onnx` comes, what was made with the old one goes.
    """
    staged = sorted(path.relative_to(stage) for path in stage.rglob("*") if path.is_file())
    for file in sorted(staged, key=lambda path: path.name == NAME):
        (repository / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(stage / file, repository / file)
    for folder in (file.parent for file in staged if file.name == "model.onnx"):
        config = folder.parent / "configs" / f"{CONFIG_NAME}.pbtxt"
        for made in (folder / "model.onnx.data", folder / PLAN, config):
            if made not in staged:
                (repository / made).unlink(missing_ok=True)
