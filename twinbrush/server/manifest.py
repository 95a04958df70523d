"""The manifest that an export leaves in a model repository, held against the files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "MANIFEST.json"


class ManifestError(RuntimeError):
    """A file of the repository is not the one that was exported; the message names it."""


def verify(repository: Path) -> None:
    """Compares every exported file with the hash in the manifest, where there is one.

    Raises:
        ManifestError: a file is missing or another, or it or the manifest cannot be read.
    """
    manifest = repository / NAME
    if not manifest.is_file():
        return
    with reading(manifest):
        content = json.loads(manifest.read_text())
        expected = {
            repository / model["model"] / "1" / name: sha256
            for model in content["models"]
            for name, sha256 in model["sha256"].items()
        }
        expected |= {repository / name: sha256 for name, sha256 in content.get("files", {}).items()}
    for file, sha256 in expected.items():
        try:
            if not file.is_file():
                raise ManifestError(f"{file} is missing: export again")
            found = sha256_of(file)
        except OSError as error:
            text = f"{file} cannot be read: {error.strerror}"
            raise ManifestError(f"{text}; the server's user needs to read it") from None
        if found != sha256:
            text = f"{file} is not the file that was exported, by its hash in {NAME}"
            raise ManifestError(f"{text}: export again, or start with --no-verify")


@contextmanager
def reading(manifest: Path) -> Iterator[None]:
    """Makes of what a broken manifest raises a `ManifestError`."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestError(f"{manifest} cannot be read: {error!r}") from error


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
