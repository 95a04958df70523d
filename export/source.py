"""Where the parts of a checkpoint come from: folders, single files and hub repositories.

Knows which files of a source exist and how to download them, and nothing of their content.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from networks.loading import CheckpointError, first_line

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
# Files that say what a repository holds; all are small and are downloaded before any weight.
SMALL_FILES = ("*.json", "*.txt", "*.model")
FILE_SUFFIXES = (
    ".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".pkl", ".gguf", ".onnx", ".json", ".zip",
)  # fmt: skip
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")


@dataclass(frozen=True)
class Source:
    """A checkpoint, and the parts that come from elsewhere.

    Attributes:
        checkpoint: folder or hub id in diffusers layout, or one `.safetensors` file.
        revision: commit, tag or branch, where it is a hub id.
        subfolder: of the checkpoint, where it is not at the top.
        variant: of the weight files, as in `fp16`; None takes plain files, or the only variant.
        bert: folder or hub id of a text model and its tokenizer.
        bert_revision: the revision of `bert`.
        vae: folder or hub id of an autoencoder, or its `.safetensors` file.
        tokenizer: folder or hub id of CLIP's tokenizer.
        clip_skip: layers of CLIP's towers, from the end, whose results are not used.
    """

    checkpoint: str
    revision: str | None = None
    subfolder: str | None = None
    variant: str | None = None
    bert: str | None = None
    bert_revision: str | None = None
    vae: str | None = None
    tokenizer: str | None = None
    clip_skip: int = 0


@dataclass(frozen=True)
class Tree:
    """The files of one source.

    Attributes:
        folder: where they are, or will be after `fetch`.
        names: of all files, relative to `folder`, downloaded or not.
        hub: id and commit of a hub repository, None for a folder.
        prefix: of the names, inside the hub repository.
    """

    folder: Path
    names: frozenset[str]
    hub: tuple[str, str] | None = None
    prefix: str = ""

    def within(self, part: str) -> list[str]:
        """Names of the files directly in the folder `part`; "" is the top."""
        start = f"{part}/" if part else ""
        found = [name.removeprefix(start) for name in self.names if name.startswith(start)]
        return sorted(name for name in found if "/" not in name)

    def fetch(self, names: Iterable[str]) -> None:
        """Downloads files that are still on the hub.

        Raises:
            CheckpointError: the hub does not send them.
        """
        if self.hub is not None:
            source, commit = self.hub
            _download(source, commit, [self.prefix + name for name in sorted(names)])


def check_source(source: Source) -> None:
    """Checks the options against each other.

    Raises:
        CheckpointError: a revision belongs to no hub id, or a subfolder to no folder.
    """
    if source.subfolder and Path(source.checkpoint).expanduser().is_file():
        text = f"--subfolder {source.subfolder}: {source.checkpoint} is a file"
        raise CheckpointError(f"{text}, only a folder or a hub id has subfolders")
    for flag, revision, place in (
        ("--revision", source.revision, source.checkpoint),
        ("--bert-revision", source.bert_revision, source.bert),
    ):
        if revision is not None and place is None:
            raise CheckpointError(f"{flag} {revision}: there is no --bert")
        if revision is not None and place is not None and Path(place).expanduser().exists():
            kind = "folder" if Path(place).expanduser().is_dir() else "file"
            text = f"{flag} {revision}: {place} is a {kind}, only a hub id has revisions"
            raise CheckpointError(text)


def open_tree(
    place: str,
    revision: str | None = None,
    subfolder: str | None = None,
    what: str = "checkpoint",
) -> Tree:
    """Finds the files of a folder or hub repository; downloads only the small ones.

    Args:
        place: folder or hub id.
        revision: of a hub id.
        subfolder: of the place.
        what: names the place in errors, an option or "checkpoint".

    Raises:
        CheckpointError: there is no such folder, or the hub does not send it.
    """
    prefix = f"{subfolder.strip('/')}/" if subfolder and subfolder.strip("/.") else ""
    if ".." in Path(prefix).parts:
        raise CheckpointError(f"--subfolder {subfolder} leaves the checkpoint: name a folder in it")
    path = Path(place).expanduser()
    if path.exists() or looks_like_path(place):
        check_folder(path, place, what)
        folder = path / prefix
        if not folder.is_dir():
            folders = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
            raise CheckpointError(f"--subfolder {subfolder} is not in {place}: it has {folders}")
        return Tree(folder, _names(folder))
    if not HUB_ID.fullmatch(place):
        raise CheckpointError(f"{what} {place} is not there, and is no hub id")
    top = _download(
        place, revision, [f"{prefix}{deep}{p}" for deep in ("", "*/") for p in SMALL_FILES]
    )
    if not (top / prefix).is_dir():
        raise CheckpointError(f"--subfolder {subfolder} is not in {place}")
    commit = top.name
    names = _listed(place, commit) or _names(top) | {
        f"{prefix}{name}" for name in _names(top / prefix)
    }
    here = frozenset(name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return Tree(top / prefix, here, (place, commit), prefix)


def looks_like_path(text: str) -> bool:
    """Whether a text names a place on this machine, existing or not, and never a hub id."""
    first = text.partition("/")[0]
    return (
        text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or text.endswith("/")
        or "\\" in text
        or text.lower().endswith(FILE_SUFFIXES)
        or ("/" in text and Path(first).exists())
    )


def check_folder(path: Path, text: str, what: str = "checkpoint") -> None:
    """Raises CheckpointError where `path` is no folder, with what it is instead."""
    if path.is_dir():
        return
    if "://" in text:
        host, *parts = text.split("://", 1)[1].split("/")
        hub_id = f"give the hub id alone, as {'/'.join(parts[:2])}"
        advice = hub_id if host in HUB_HOSTS else "download its file and give that"
        raise CheckpointError(f"{what} {text} is an address: {advice}")
    if not path.exists():
        near = next((p for p in path.parents if p.exists()), Path())
        raise CheckpointError(f"{what} {text} is not there: {near} has no such file or folder")
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{text} is a pickle, which can run code and is not read: convert it to .safetensors"
        )
    if path.suffix.lower() == ".safetensors":
        raise CheckpointError(f"{what} {text} is a file: give the folder that it belongs to")
    raise CheckpointError(
        f"{text} is a file that is not read: give a folder in diffusers layout"
        " or a .safetensors file"
    )


def _names(folder: Path) -> frozenset[str]:
    """Files at the top of a folder and one level below."""
    found = [*folder.glob("*"), *folder.glob("*/*")]
    return frozenset(p.relative_to(folder).as_posix() for p in found if p.is_file())


def _listed(source: str, commit: str) -> frozenset[str]:
    """All names in a hub repository; empty where the hub cannot be asked."""
    try:
        return frozenset(huggingface_hub.HfApi().list_repo_files(source, revision=commit))
    except Exception:  # offline: what was downloaded before is all there is
        return frozenset()


def _download(source: str, revision: str | None, names: list[str]) -> Path:
    try:
        return Path(
            huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=names)
        )
    except Exception as error:
        text = f"{source} is not a folder, and the hub did not give it: {first_line(error)}"
        raise CheckpointError(text) from error
