"""Building inside the repository that serves, and putting what was built in its place.

Nothing of the old repository is touched before everything new is built. What is replaced is kept
until all is in place, and put back when that fails; where an export is killed just then, the
next one puts it back.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from twinbrush.engine.config import ENGINE
from twinbrush.server.manifest import NAME
from twinbrush.server.plans import CONFIG_NAME, PLAN

# On the repository's file system, and as writable; in the folder of a model Triton ignores what
# is no version, beside the models it would load it as one.
FOLDER = ENGINE.parent / ".building"
STAGE = FOLDER / "stage"
UNDO = "undo"  # beside the stage while files are replaced: `old` ones, and names of `added` ones


@contextmanager
def staging(repository: Path) -> Iterator[Path]:
    """A folder on the repository's file system that is gone afterwards.

    What a killed export left is put back or removed first.

    Raises:
        OSError: another export builds into the repository, or it cannot be written.
    """
    folder, stage = repository / FOLDER, repository / STAGE
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError("another export builds into it") from None
        try:
            _put_back(folder / UNDO, repository)
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir()
            yield stage
        finally:
            _put_back(folder / UNDO, repository)
            shutil.rmtree(folder, ignore_errors=True)


def put_in_place(stage: Path, repository: Path, absent: Sequence[Path] = ()) -> None:
    """Renames every staged file to its place, the manifest last; renames need no space.

    Files and folders of `absent` models go: Triton would try to load them.
    Where a new `model.onnx` comes, what was made with the old one goes. When this fails,
    `staging` puts back what it has replaced.
    """
    undo = stage.parent / UNDO
    staged = sorted(path.relative_to(stage) for path in stage.rglob("*") if path.is_file())
    for folder in (file.parent for file in staged if file.name == "model.onnx"):
        config = folder.parent / "configs" / f"{CONFIG_NAME}.pbtxt"
        for made in (folder / "model.onnx.data", folder / PLAN, config):
            if made not in staged:
                _take_away(made, repository, undo)
    for place in (repository / name for name in absent):
        for file in sorted(path for path in (place, *place.rglob("*")) if path.is_file()):
            _take_away(file.relative_to(repository), repository, undo)
    for file in sorted(staged, key=lambda path: path.name == NAME):
        _take_away(file, repository, undo)
        (repository / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(stage / file, repository / file)
    os.replace(undo, stage / UNDO)  # from here on, nothing is put back
    for name in absent:
        shutil.rmtree(repository / name, ignore_errors=True)


def _take_away(file: Path, repository: Path, undo: Path) -> None:
    """Moves a file of the repository to the old ones, or marks that there is none."""
    there = (repository / file).is_file()
    kept = undo / ("old" if there else "added") / file
    kept.parent.mkdir(parents=True, exist_ok=True)
    if there:
        os.replace(repository / file, kept)
    else:
        kept.touch()


def _put_back(undo: Path, repository: Path) -> None:
    """Undoes a `put_in_place` that has not ended; may itself be interrupted and begun again."""
    for kind in ("added", "old"):
        for kept in [path for path in (undo / kind).rglob("*") if path.is_file()]:
            file = repository / kept.relative_to(undo / kind)
            if kind == "old":
                os.replace(kept, file)
            elif file.is_file():
                file.unlink()
    shutil.rmtree(undo, ignore_errors=True)
