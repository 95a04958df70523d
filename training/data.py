"""What stages train on: the interface of a source, and the tokens of its captions.

Captioned pictures from disk and the web are in `captioned`. Knows no world: what a source knows of
its pictures beside their captions passes through here unread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

CPU = torch.device("cpu")
MAX_TOKENS = 40  # of the tokenizers and encoders that `clip` and `bert` train


class BadInput(ValueError):
    """Training cannot do what its options say; one sentence names the option and its value."""


@dataclass(frozen=True)
class Batch:
    """What a stage sees at a step.

    Attributes:
        pictures: (B, 3, S, S) in [-1, 1]; (0, 3, S, S) in batches of captions only.
        captions: one a picture.
        truth: what the source knows of each picture, for its own objective; empty if nothing.
    """

    pictures: Tensor
    captions: list[str]
    truth: list[Any] = field(default_factory=list)


class Batches(Protocol):
    """Batches in the order of the steps."""

    @property
    def position(self) -> dict[str, Any] | None:
        """Where the next batch begins, in JSON's types; None if its step alone determines it."""

    def resume(self, position: dict[str, Any] | None) -> None:
        """Continues from a position.

        Raises:
            BadInput: the position is of other data.
        """

    def at(self, step: int) -> Any:
        """The batch of a step; steps are requested in order, each once."""

    def report(self) -> str:
        """Counts of rows used and left out so far, for people; empty if all are used."""

    def close(self) -> None:
        """Ends the threads and processes that prepare batches."""


class Objective(Protocol):
    """A loss that a source adds to the training of text encoders, from the truth of its captions.

    Hidden states of tokens predict what the source knows of the caption.
    """

    def module(self, width: int) -> nn.Module:
        """The weights that read hidden states of `width`; they are trained and then dropped."""

    def loss(
        self, module: nn.Module, hidden: Tensor, targets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of hidden states (B, L, width), and what else is worth a curve."""

    def targets(
        self, tokenizer: PreTrainedTokenizerBase, captions: list[str], truth: Sequence[Any]
    ) -> Tensor:
        """What `loss` compares with: (B, `MAX_TOKENS`, …)."""


class Source(Protocol):
    """Captioned pictures to train on."""

    @property
    def side(self) -> int:
        """Of its pictures, in pixels."""

    @property
    def vocabulary(self) -> int:
        """The size of a tokenizer for its captions."""

    @property
    def objective(self) -> Objective | None:
        """A further loss for text encoders; None if the source knows captions only."""

    def corpus(self, seed: int, count: int) -> list[str]:
        """Captions to train tokenizers on, `count` at most."""

    def sample(self, seed: int, count: int) -> Batch:
        """The same pictures and captions for the same seed, `count` at most, on the CPU."""

    def batches(
        self,
        seed: int,
        size: int,
        device: torch.device,
        captions_only: bool = False,
        near: bool = False,
    ) -> Batches:
        """`Batch`es of `size` on `device`, in an order drawn from `seed`.

        Args:
            captions_only: no pictures, and captions as users would write them.
            near: puts near misses of a picture beside it, if the source can.
        """

    def latents(
        self, checkpoint: Path, cache: Path, size: int, device: torch.device
    ) -> Batches | None:
        """`LatentBatch`es of latents that are encoded once and kept in the folder `cache`.

        None if pictures must be encoded as they come.
        """


def no_pictures(side: int) -> Tensor:
    return torch.empty(0, 3, side, side)


def on_device(batch: Batch, device: torch.device) -> Batch:
    return replace(batch, pictures=batch.pictures.to(device))


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Ids and mask, padded to `MAX_TOKENS`: both (B, MAX_TOKENS) int64."""
    encoded = tokenizer(
        texts,
        padding="max_length",
        truncation=True,
        max_length=MAX_TOKENS,
        return_tensors="pt",
        return_attention_mask=True,
    )
    return encoded["input_ids"].to(device), encoded["attention_mask"].to(device)
