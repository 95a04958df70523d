"""What a server leaves outside its process, by names that say whose it is; and sweeping it.

A launcher's folder and shared memory carry its namespace of process ids, its id there and the time
it started. A launcher that was killed cannot clean up, so the next one does it for all of its own
namespace whose process is gone. Of other namespaces, as of containers that share `/dev/shm`, it
cannot see which processes live.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from twinbrush.server import processes
from twinbrush.server.errors import ServerError
from twinbrush.server.processes import STUB

SHARED_MEMORY = Path("/dev/shm")
FALLBACKS = (Path("/tmp"), Path("/var/tmp"), Path("/run"), SHARED_MEMORY)
NAMESPACE = Path("/proc/self/ns/pid")
SERVER = "tritonserver"
OWNER = re.compile(r"twinbrush[-_]ns(\d+)[-_](\d+)[-_](\d+)[-_]")
# Triton 24.10 starts its Python stubs by an unquoted shell line, in the C locale.
SAFE_PATH = re.compile(r"[A-Za-z0-9/._+,@%=-]+")


def is_safe(path: Path) -> bool:
    """Whether Triton can put the path on its stubs' command line."""
    return SAFE_PATH.fullmatch(str(path)) is not None


def new_folder() -> Path:
    """A folder of this launcher, in TMPDIR or, where that cannot be used, another.

    Raises:
        ServerError: no folder can be written.
    """
    owner = f"twinbrush-{'-'.join(_this_process())}-"
    for parent in _parents():
        try:
            return Path(tempfile.mkdtemp(prefix=owner, dir=parent))
        except OSError:
            continue
    names = ", ".join(map(str, FALLBACKS))
    text = "no folder for temporary files: give one in TMPDIR that is writable and has no blanks"
    raise ServerError(f"{text} or special characters in its path; {names} do not work", False)


def new_region() -> str:
    """The beginning of the names of one server's shared memory."""
    return f"twinbrush_{'_'.join(_this_process())}_{time.monotonic_ns()}_"


def safe_repository(repository: Path, folder: Path) -> Path:
    """The repository by a path that Triton can use: its own, or a link in `folder`."""
    real = repository.resolve()
    if is_safe(real):
        return real
    link = folder / "repository"
    link.symlink_to(real)
    return link


def overlay(repository: Path, folder: Path, models: Iterable[str]) -> Path:
    """A repository in `folder` that holds links to some models of another, and nothing else."""
    made = folder / "repository"
    made.mkdir()
    for model in models:
        (made / model).symlink_to((repository / model).resolve())
    return made


def remove(folder: Path, region: str) -> None:
    """Removes one server's folder and shared memory."""
    for segment in SHARED_MEMORY.glob(f"*{region}*"):
        segment.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def sweep() -> list[Path]:
    """Removes what launchers that are gone have left; returns it.

    Ends their stubs too: one that waits for its server without Python's lock never ends by itself.
    """
    for pid in _orphans():
        with contextlib.suppress(OSError):  # it ended, or is another user's
            os.kill(pid, signal.SIGKILL)
    swept = []
    for path in {p for parent in {*_parents(), SHARED_MEMORY} for p in parent.glob("*twinbrush*")}:
        if not _is_left(path.name):
            continue
        try:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError:  # another user's
            continue
        swept.append(path)
    return swept


def _orphans() -> Iterator[int]:
    """Stubs without a server whose launcher is gone."""
    for folder in processes.PROC.glob("[0-9]*"):
        pid = int(folder.name)
        program = processes.program(pid)
        if program.endswith(STUB) and _is_left(program):
            fields = processes.stat(pid)
            if fields is not None and not processes.program(int(fields[1])).endswith(SERVER):
                yield pid


def _is_left(name: str) -> bool:
    """Whether a name is of a launcher that is gone, as far as this process can see."""
    owner = OWNER.search(name)
    if owner is None or owner[1] != _namespace():
        return False
    return processes.start_time(int(owner[2])) != owner[3]


def _this_process() -> tuple[str, str, str]:
    """Namespace, process id and start time."""
    me = os.getpid()
    return f"ns{_namespace()}", str(me), processes.start_time(me) or ""


def _namespace() -> str:
    return str(NAMESPACE.stat().st_ino)


def _parents() -> list[Path]:
    given = [Path(value) for name in ("TMPDIR", "TEMP", "TMP") if (value := os.environ.get(name))]
    return [path for path in (*given, *FALLBACKS) if is_safe(path.absolute())]
