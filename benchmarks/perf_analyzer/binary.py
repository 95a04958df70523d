"""Finds perf_analyzer, or takes it from its wheel: `python -m benchmarks.perf_analyzer.binary`.

NVIDIA's SDK container has it on PATH. Elsewhere it is in a wheel: of `tritonclient` 2.51, which
runs on older systems with two libraries of the pip package of Triton's server, or of
`perf-analyzer`, which needs glibc 2.38. Knows nothing of loads and results.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("build/perf_analyzer")
OLD_WHEEL, NEW_WHEEL = "tritonclient==2.51.0", "perf-analyzer==2.60.0"
NEW_GLIBC = (2, 38)
# What the old binary loads, and the files of nvidia_pytriton.libs that stand for it.
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}


@dataclass(frozen=True)
class Binary:
    """A perf_analyzer that can be started.

    Attributes:
        path: of the executable.
        libraries: folder that it needs on LD_LIBRARY_PATH, or None.
    """

    path: Path
    libraries: Path | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The environment that it runs in."""
        if self.libraries is None:
            return dict(os.environ)
        paths = [str(self.libraries), os.environ.get("LD_LIBRARY_PATH", "")]
        return os.environ | {"LD_LIBRARY_PATH": ":".join(filter(None, paths))}

    def version(self) -> str:
        """What it calls itself.

        Raises:
            RuntimeError: it does not start.
        """
        done = subprocess.run(
            [self.path, "--version"], env=self.environment, capture_output=True, text=True
        )
        said = (done.stdout + done.stderr).strip()
        if done.returncode:
            raise RuntimeError(f"{self.path} does not start: {said}")
        return said.removeprefix("Perf Analyzer Version ").partition("\n")[0]


def find_binary(folder: Path = FOLDER) -> Binary | None:
    """The perf_analyzer of PATH, else the one of `install`, else None."""
    if on_path := shutil.which("perf_analyzer"):
        return Binary(Path(on_path))
    for path in (folder / "bin" / "perf_analyzer", folder / "perf_analyzer/bin/perf_analyzer"):
        if path.is_file():
            libraries = folder / "lib"
            return Binary(path.absolute(), libraries.absolute() if libraries.is_dir() else None)
    return None


def install(folder: Path = FOLDER) -> Binary:
    """Takes the binary from the wheel that this system's glibc can run.

    Raises:
        RuntimeError: the wheel has no binary, or the server's libraries are not installed.
        subprocess.CalledProcessError: pip failed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    new = _glibc() >= NEW_GLIBC
    wheel = NEW_WHEEL if new else OLD_WHEEL
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    subprocess.run([*command, "--target", str(folder), wheel], check=True)
    if not new:
        _link_libraries(folder / "lib")
    binary = find_binary(folder)
    if binary is None:
        raise RuntimeError(f"{wheel} has no perf_analyzer for this system")
    binary.path.chmod(0o755)
    binary.version()
    return binary


def _glibc() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.libc_ver()[1].split("."))


def _link_libraries(folder: Path) -> None:
    """Plain names for the suffixed libraries that pip's Triton server brings."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise RuntimeError("nvidia-pytriton is not installed: run `make test` or `make serve` once")
    source = Path(spec.origin).parent.parent / "nvidia_pytriton.libs"
    folder.mkdir(parents=True)
    for name, pattern in LIBRARIES.items():
        file = next(source.glob(pattern), None)
        if file is None:
            raise RuntimeError(f"{source} has no {pattern}")
        (folder / name).symlink_to(file)


if __name__ == "__main__":
    found = install()
    print(f"perf_analyzer {found.version()}: {found.path}")
