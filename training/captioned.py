"""Captioned pictures as a source to train on: in order, shuffled, loaded ahead, resumable.

Rows come from `formats` and become training data by `preparation`. The order depends on the
seed alone: files are shuffled every epoch and rows in blocks, so a place in it is a file
position, a block and a row, and a run goes on from there with nothing repeated or lost.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.data import BadInput, Batch, no_pictures
from training.formats import PATH, Format, find_format
from training.preparation import OF_LOADING, Fetcher, LeftOut, Preparation, Row

VOCABULARY = 16_384  # of tokenizers trained on captions of the world
MOST_AHEAD = 10_000  # rows read ahead of the one in use, most of them left out
PEEKED = 100  # rows that are looked at for columns before work starts


@dataclass(frozen=True)
class Place:
    """How far a stream of rows was read: `row` rows of the block that begins at `stream`."""

    epoch: int = 0
    block: int = 0
    row: int = 0
    stream: dict[str, Any] | None = None  # `datasets`' state at the block's start; None: the first


@dataclass(frozen=True)
class Captioned:
    """Captioned pictures at a path; `shuffle` rows are mixed at a time.

    Raises:
        BadInput: the path holds nothing that can be read, or a bound names a column that
            neither its data nor the defaults have.
    """

    path: Path
    preparation: Preparation = field(default_factory=Preparation)
    shuffle: int = 2000
    vocabulary: int = VOCABULARY
    format: Format = field(init=False)

    def __post_init__(self) -> None:
        if self.shuffle < 1:
            raise BadInput(f"--shuffle: {self.shuffle} is not 1 or more rows")
        object.__setattr__(self, "format", find_format(self.path))
        self._check_bounds()

    @property
    def side(self) -> int:
        return self.preparation.side

    @property
    def objective(self) -> None:
        """Captions are all that is known."""

    @cached_property
    def identity(self) -> str:
        """A key of the rows, their order and their preparation."""
        chosen = asdict(self.preparation).items()
        kept = {name: value for name, value in chosen if name not in OF_LOADING}
        files = [(str(f), f.stat().st_size if f.is_file() else 0) for f in self.format.files]
        held = hashlib.sha256(repr(files).encode()).hexdigest()
        return f"{self.path.resolve()}, files {held}, {self.shuffle} shuffled, {kept}"

    def corpus(self, seed: int, count: int) -> list[str]:
        """Clean captions of rows that pass, from one epoch."""
        texts = []
        for row, _ in self.rows(seed, epochs=1):
            if len(texts) == count:
                break
            try:
                texts.append(self.preparation.caption(row))
            except LeftOut:
                continue  # counted where the row is met in training
        if not texts:
            raise BadInput(f"--data: no caption of {self.path} passes the filters")
        return texts

    def sample(self, seed: int, count: int) -> Batch:
        """The first pictures of the order that `seed` gives, from one epoch."""
        batches = CaptionedBatches(self, seed, count, torch.device("cpu"), epochs=1)
        try:
            return batches.at(0)
        finally:
            batches.close()

    def batches(
        self,
        seed: int,
        size: int,
        device: torch.device,
        captions_only: bool = False,
        near: bool = False,
    ) -> CaptionedBatches:
        """Batches of any pictures: which ones are near misses of others is not known."""
        return CaptionedBatches(self, seed, size, device, captions_only)

    def latents(self, checkpoint: Path, cache: Path, size: int, device: torch.device) -> None:
        """None: a data set may be larger than any cache."""

    def rows(
        self, seed: int, place: Place = Place(), epochs: float = math.inf
    ) -> Iterator[tuple[Row, Place]]:
        """Rows from a place to the end of so many epochs, each with the place after it."""
        epoch, block, done, start = place.epoch, place.block, place.row, place.stream
        while epoch < epochs:
            files = self.format.files
            order = np.random.default_rng((seed, epoch)).permutation(len(files))
            stream = self.format.open([files[i] for i in order])
            if start is not None:
                stream.load_state_dict(start)
            read = iter(stream)
            while True:
                # A stream that was put somewhere does not say so before it has read.
                start = start or copy.deepcopy(stream.state_dict())
                held = list(islice(read, self.shuffle))
                if not held:
                    break
                mixed = np.random.default_rng((seed, epoch, block)).permutation(len(held))
                for k in range(done, len(held)):
                    yield held[mixed[k]], Place(epoch, block, k + 1, start)
                block, done, start = block + 1, 0, None
            epoch, block, start = epoch + 1, 0, None

    def _check_bounds(self) -> None:
        rows = list(islice(self.format.open(list(self.format.files)), PEEKED))
        columns = sorted({name for row in rows for name in row} - {"picture", PATH})
        defaults = {bound.column for bound in Preparation().bounds}
        for bound in self.preparation.bounds:
            if bound.column not in columns and bound.column not in defaults:
                raise BadInput(
                    f"--keep: '{bound}' names a column that the data has not; it has"
                    f" {', '.join(columns)}"
                )


class CaptionedBatches:
    """Batches of a `Captioned` source; pictures are loaded ahead by threads.

    Attributes:
        counts: rows `used`, and left out by each reason, up to the last batch.
    """

    def __init__(
        self,
        source: Captioned,
        seed: int,
        size: int,
        device: torch.device,
        captions_only: bool = False,
        epochs: float = math.inf,
    ):
        self._source, self._seed, self._size, self._device = source, seed, size, device
        self._captions_only, self._epochs = captions_only, epochs
        self._fetcher = Fetcher(source.preparation)
        self._pool: ThreadPoolExecutor | None = None
        self._place = Place()
        self._rows: Iterator[tuple[Row, Place]] | None = None
        self._ahead: deque[tuple[str, Future | LeftOut | None, Place]] = deque()
        self._coming = 0  # rows of those ahead that are not left out already
        self.counts: Counter[str] = Counter()

    @property
    def position(self) -> dict[str, Any]:
        return {
            "data": self._source.identity,
            "place": vars(self._place),
            "counts": dict(self.counts),
        }

    def resume(self, position: dict[str, Any] | None) -> None:
        if position is None:
            raise BadInput("--data: the run's save was trained without --data; take another --runs")
        if position.get("data") != self._source.identity:
            raise BadInput(
                "--data: the run's save was trained on other data, or with other options of it;"
                " take another --runs"
            )
        self._place, self.counts = Place(**position["place"]), Counter(position["counts"])

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
            self._rows.close()

    def at(self, step: int) -> Batch:
        """The next batch; a smaller one where the epochs end in it.

        Raises:
            BadInput: a whole epoch has passed without a row that can be used.
        """
        captions: list[str] = []
        pictures: list[np.ndarray] = []
        used = self._place.epoch  # of the last row that could be
        while len(captions) < self._size and (upcoming := self._next()):
            caption, loading, place = upcoming
            if place.epoch > used + 1:
                captions.clear()
                break
            self._place = place
            try:
                if isinstance(loading, LeftOut):
                    raise loading
                if loading is not None:
                    pictures.append(loading.result())
                captions.append(caption)
                used = place.epoch
                self.counts["used"] += 1
            except LeftOut as reason:
                self.counts[str(reason)] += 1
        if not captions:
            raise BadInput(f"--data: nothing in {self._source.path} can be used: {self.report()}")
        stacked = no_pictures(self._source.side)
        if pictures:
            stacked = torch.from_numpy(np.stack(pictures)).to(self._device, non_blocking=True)
            stacked = stacked.permute(0, 3, 1, 2).float() / 127.5 - 1
        return Batch(stacked, captions)

    def _next(self) -> tuple[str, Future | LeftOut | None, Place] | None:
        """The next row in order, while those after it are being loaded; None at the end."""
        if self._rows is None:
            self._rows = self._source.rows(self._seed, self._place, self._epochs)
            self._pool = ThreadPoolExecutor(self._source.preparation.fetchers)
        while self._coming < 2 * self._size and len(self._ahead) < MOST_AHEAD:
            if (read := next(self._rows, None)) is None:
                break
            self._ahead.append(self._started(*read))
            self._coming += not isinstance(self._ahead[-1][1], LeftOut)
        if not self._ahead:
            return None
        self._coming -= not isinstance(self._ahead[0][1], LeftOut)
        return self._ahead.popleft()

    def _started(self, row: Row, place: Place) -> tuple[str, Future | LeftOut | None, Place]:
        try:
            caption = self._source.preparation.caption(row)
        except LeftOut as reason:
            return "", reason, place
        if self._captions_only:
            return caption, None, place
        rng = np.random.default_rng((self._seed, place.epoch, place.block, place.row))
        return caption, self._pool.submit(self._load, row, rng), place

    def _load(self, row: Row, rng: np.random.Generator) -> np.ndarray:
        encoded = self._fetcher.read(Path(row[PATH]) if PATH in row else row["picture"])
        return self._source.preparation.picture(encoded, rng)

    def report(self) -> str:
        """Rows used and left out up to the last batch."""
        left_out = {reason: n for reason, n in sorted(self.counts.items()) if reason != "used"}
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in left_out.items()) or "none"
        used = self.counts["used"]
        return f"{used + sum(left_out.values()):,} rows, {used:,} used; left out: {reasons}"
