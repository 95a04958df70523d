"""Captioned data on disk as rows, through the `datasets` library, without decoding pictures.

A row has `text`, `picture` (encoded bytes, an address, or None) or `file` (a path), and whatever
other columns the data has. Tars and folders have readers of their own here, because those of
`datasets` end at the first sample that lacks a part; these give it to be counted.
"""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from training.data import BadInput
from training.preparation import Row

if TYPE_CHECKING:
    from datasets import IterableDataset

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
TEXT_COLUMNS = ("text", "caption")
IMAGE_COLUMNS = ("image", "jpg", "png")
PATH = "/path"  # key of a picture's file in a row; no column of data bears a slash


@dataclass(frozen=True)
class Format:
    """Files of one kind, and how some of them are opened as a stream of rows."""

    files: tuple[Path, ...]
    open: Callable[[list[Path]], IterableDataset]


def find_format(path: Path) -> Format:
    """What lies at a path: WebDataset tars, parquet, metadata files, or pictures with texts.

    The first of these kinds is taken: tools write tars with parquet of the same rows beside.

    Raises:
        BadInput: nothing is there, or nothing of these kinds, or parquet without the columns.
    """
    if not path.exists():
        raise BadInput(f"--data: {path} does not exist")
    found = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if not found:
        raise BadInput(f"--data: {path} is empty")
    if tars := [p for p in found if p.suffix == ".tar"]:
        return Format(tuple(tars), partial(_generated, _tar_rows))
    if tables := [p for p in found if p.suffix == ".parquet"]:
        for table in tables:
            _parquet_columns(table)
        return Format(tuple(tables), _parquet)
    if lists := [p for p in found if p.name in ("metadata.jsonl", "metadata.csv")]:
        return Format(tuple(lists), partial(_generated, _metadata_rows))
    if texts := [p for p in found if p.suffix == ".txt"]:
        pictures = [p for p in found if p.suffix.lower() in PICTURES]
        if pictures:
            stems = {p.with_suffix("") for p in texts + pictures}
            return Format(tuple(sorted(stems)), partial(_generated, _pair_rows))
    raise BadInput(
        f"--data: {path} holds no .tar, no .parquet, no metadata.jsonl or metadata.csv, and no"
        " pictures with .txt files of the same names"
    )


def _generated(rows: Callable[[list[str]], Iterator[Row]], files: list[Path]) -> IterableDataset:
    from datasets import IterableDataset

    return IterableDataset.from_generator(rows, gen_kwargs={"files": [str(p) for p in files]})


def _tar_rows(files: list[str]) -> Iterator[Row]:
    """Samples are neighbours in a tar that share a name up to its first dot."""
    for path in files:
        try:
            with tarfile.open(path, "r:") as tar:
                name, parts = None, {}
                for member in tar:
                    if not member.isfile():
                        continue
                    folder, _, file = member.name.rpartition("/")
                    stem, _, extension = file.partition(".")
                    if (folder, stem) != name:
                        if parts:
                            yield _sample(parts)
                        name, parts = (folder, stem), {}
                    parts[f".{extension.lower()}"] = tar.extractfile(member).read()
                if parts:
                    yield _sample(parts)
                # Past its first member tarfile takes what it cannot read for the end.
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("it is cut or broken behind its first samples")
        except tarfile.ReadError as error:
            raise BadInput(f"--data: {path} is not a whole tar: {error}")


def _sample(parts: dict[str, bytes]) -> Row:
    row: Row = {}
    if ".json" in parts:
        try:
            described = json.loads(parts[".json"])
            row = described if isinstance(described, dict) else {}
        except ValueError:
            pass  # its text is then missing, and counted so
    text = parts.get(".txt", b"").decode(errors="replace") or _first(row, TEXT_COLUMNS)
    picture = next((parts[suffix] for suffix in PICTURES if suffix in parts), None)
    return row | {"text": text, "picture": picture}


def _metadata_rows(files: list[str]) -> Iterator[Row]:
    for path in map(Path, files):
        with path.open(newline="", encoding="utf-8") as file:
            if path.suffix == ".csv":
                rows = csv.DictReader(file)
            else:
                rows = (json.loads(line) for line in file if line.strip())
            try:
                for row in rows:
                    if None in row:  # where csv puts fields that no column is for
                        raise ValueError(f"{row[None]} is one field too many: quote commas")
                    named = row.get("file_name")
                    picture = {PATH: str(path.parent / named)} if named else {"picture": None}
                    yield row | {"text": _first(row, TEXT_COLUMNS)} | picture
            except (ValueError, TypeError, AttributeError, csv.Error) as error:
                raise BadInput(f"--data: {path} cannot be read: {error}")


def _pair_rows(files: list[str]) -> Iterator[Row]:
    for stem in files:
        text = Path(f"{stem}.txt")
        suffixes = (*PICTURES, *(suffix.upper() for suffix in PICTURES))
        picture = next((s for s in suffixes if Path(stem + s).exists()), PICTURES[0])
        yield {
            "text": text.read_text(errors="replace") if text.exists() else None,
            PATH: stem + picture,
        }


def _parquet(files: list[Path]) -> IterableDataset:
    from datasets import load_dataset

    names = [str(p) for p in files]
    stream = load_dataset("parquet", data_files=names, split="train", streaming=True)
    text, picture = _parquet_columns(files[0])
    return stream.decode(False).map(_named, fn_kwargs={"text": text, "picture": picture})


def _named(row: Row, text: str, picture: str) -> Row:
    given = row[picture]
    if isinstance(given, dict):  # how `datasets` stores pictures
        given = given["bytes"]
    return {"text": row[text], "picture": given}


def _parquet_columns(path: Path) -> tuple[str, str]:
    """The columns of captions and pictures in a parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_schema(path).names
    except pyarrow.ArrowInvalid as error:
        raise BadInput(f"--data: {path} is not parquet: {error}")
    text = next((name for name in TEXT_COLUMNS if name in columns), None)
    picture = next((name for name in (*IMAGE_COLUMNS, "url") if name in columns), None)
    if text is None or picture is None:
        raise BadInput(
            f"--data: {path} has the columns {', '.join(columns)}; needed are text or caption,"
            " and url or image"
        )
    return text, picture


def _first(row: Row, names: tuple[str, ...]) -> str | None:
    return next((row[name] for name in names if row.get(name)), None)
