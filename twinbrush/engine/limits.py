"""Bounds of an engine, from the parameters of its `config.pbtxt`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twinbrush.engine.config import whole_numbers


@dataclass(frozen=True)
class Limits:
    """Bounds of an engine, the parameters of its `config.pbtxt`.

    Attributes:
        max_rows: rows of a UNet call at the native size; fewer for larger pictures, see `capacity`.
        row_buckets: row counts that UNet calls are padded up to, for runtimes that compile shapes.
        queue_size: requests that may live at once.
        queue_work: work that may be outstanding, see `Admission`.
        call_seconds: time that one model call may take.
    """

    max_rows: int = 32
    row_buckets: tuple[int, ...] = ()
    queue_size: int = 512
    queue_work: int = 100_000
    call_seconds: int = 600

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Limits:
        """From a `config.pbtxt` in Triton's JSON form.

        Raises:
            ValueError: a parameter is missing or not allowed; the message names it.
        """
        names = ("max_rows", "queue_size", "queue_work", "call_seconds")
        single = {name: whole_numbers(config, name, 1)[0] for name in names}
        return cls(row_buckets=tuple(whole_numbers(config, "row_buckets")), **single)
