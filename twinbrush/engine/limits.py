"""Bounds of an engine, from the parameters of its `config.pbtxt`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from twinbrush.engine.config import PipelineConfig, optional_number, whole_numbers
from twinbrush.engine.memory import DeviceMemory

PARAMETERS = (
    "max_rows", "row_buckets", "queue_size", "queue_work", "client_work", "max_side", "max_pixels",
    "memory_mb", "prompt_cache_mb", "image_cache_mb", "call_seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """Bounds of an engine, the parameters of its `config.pbtxt`.

    Attributes:
        max_rows: rows of a UNet call at the native size; fewer for larger pictures, see `capacity`.
        row_buckets: row counts that UNet calls are padded up to, for runtimes that compile shapes.
        queue_size: requests that may live at once.
        queue_work: work that may be outstanding, see `Admission`.
        client_work: percent of `queue_size` and `queue_work` that one named client may have.
        call_seconds: time that one model call may take.
        max_side: pixels that a side may have, or None for the checkpoint's own bound.
        max_pixels: pixels that a picture may have, or None for any.
        memory: what the networks may take, or None where that is not bounded.
        prompt_cache_mb: of conditioning that is kept for prompts that come again, in MB.
        image_cache_mb: of files that are kept for deterministic requests that come again, in MB.
    """

    max_rows: int = 32
    row_buckets: tuple[int, ...] = ()
    queue_size: int = 512
    queue_work: int = 100_000
    client_work: int = 50
    call_seconds: int = 600
    max_side: int | None = None
    max_pixels: int | None = None
    memory: DeviceMemory | None = None
    prompt_cache_mb: int = 256
    image_cache_mb: int = 0

    @classmethod
    def of_config(cls, config: Mapping[str, Any], device: DeviceMemory | None = None) -> Limits:
        """From a `config.pbtxt` in Triton's JSON form.

        Args:
            config: its parameter `memory_mb` replaces the budget of `device`.
            device: what the networks may take.

        Raises:
            ValueError: a parameter is missing or not allowed; the message names it.
        """
        names = ("max_rows", "queue_size", "queue_work", "call_seconds")
        single = {name: whole_numbers(config, name, 1)[0] for name in names}
        client_work = optional_number(config, "client_work") or cls.client_work
        if client_work > 100:
            text = f"parameter client_work={client_work} of config.pbtxt is not allowed"
            raise ValueError(f"{text}: must be at most 100 percent")
        if megabytes := optional_number(config, "memory_mb"):
            device = replace(device or DeviceMemory(0), budget=megabytes * 1e6, chosen=True)
        return cls(
            row_buckets=tuple(whole_numbers(config, "row_buckets")),
            client_work=client_work,
            max_side=optional_number(config, "max_side"),
            max_pixels=optional_number(config, "max_pixels"),
            memory=device,
            prompt_cache_mb=optional_number(config, "prompt_cache_mb") or cls.prompt_cache_mb,
            image_cache_mb=optional_number(config, "image_cache_mb") or cls.image_cache_mb,
            **single,
        )

    def bounded(self, config: PipelineConfig) -> PipelineConfig:
        """The checkpoint's settings with this server's bounds on sizes.

        Raises:
            ValueError: a bound forbids the native size, which requests default to, or allows
                sides that the checkpoint does not.
        """
        pixels = config.native_width * config.native_height
        for name, value, least in (
            ("max_side", self.max_side, config.native_side),
            ("max_pixels", self.max_pixels, pixels),
        ):
            if value is not None and value < least:
                text = f"parameter {name}={value} of config.pbtxt is not allowed"
                raise ValueError(f"{text}: must be at least {least}, for the native size")
        if self.max_side is not None and self.max_side > config.max_side:
            text = f"parameter max_side={self.max_side} of config.pbtxt is not allowed: must be"
            raise ValueError(f"{text} at most {config.max_side}, the checkpoint's own bound")
        return replace(config, side_limit=self.max_side, max_pixels=self.max_pixels)
