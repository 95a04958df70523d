"""The objective of scenes: what each word of a caption names, and where that object stands.

Masked words teach which words go together; they hardly teach whether the circle or the square is
on the left, and a UNet's loss does not either. As in MDETR (arXiv:2104.12763), every word of an
object's name is tied to the object: BERT's hidden states, and the fusion head's tokens, learn to
predict what the object is and where it stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from examples.scenes.scenes import (
    COLOURS,
    OPPOSITE,
    SHAPES,
    SIZES,
    Item,
    Scene,
    middle_item,
    relation,
    says_between,
)
from training.data import MAX_TOKENS
from training.losses import IGNORED, cross_entropy

NOBODY = "nobody"  # is the partner of an object alone, and of one between two others
# Questions about each word of an object's name, and their possible answers.
QUESTIONS = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "place": (*OPPOSITE, "between", "outside", "alone"),
    "partner_shape": (*SHAPES, NOBODY),
    "partner_colour": (*COLOURS, NOBODY),
}
CHOICES = [len(answers) for answers in QUESTIONS.values()]


def partner(scene: Scene, index: int, caption: str) -> Item | None:
    """The object that the caption names this one with; None for one alone or between two."""
    if len(scene.items) == 1:
        return None
    if says_between(caption):
        middle = middle_item(scene)
        assert middle is not None, "describe says between only where it is so"
        return None if index == middle else scene.items[middle]
    return scene.items[0 if index == 1 else 1]


def place(scene: Scene, index: int, caption: str) -> str:
    """Where an object stands to its partner."""
    other = partner(scene, index, caption)
    if other is None:
        return "alone" if len(scene.items) == 1 else "between"
    if says_between(caption):
        return "outside"
    link = relation(scene.items[index], other)
    assert link is not None, "sample_scene chains its objects by clear relations"
    return link


def names(scene: Scene, caption: str) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Where the caption names an object, from one character to before another, and the answers.

    Answers are indices, one a question; a size that the caption does not name is `IGNORED`, so
    that nobody learns to tell it from the kind of object.
    """
    for index, item in enumerate(scene.items):
        other = partner(scene, index, caption)
        beside = (other.shape, other.colour) if other else (NOBODY, NOBODY)
        size = item.size if f"{item.size} {item.colour} {item.shape}" in caption else None
        values = (item.shape, item.colour, size, place(scene, index, caption), *beside)
        answers = tuple(
            IGNORED if value is None else choices.index(value)
            for choices, value in zip(QUESTIONS.values(), values, strict=True)
        )
        for found in re.finditer(f"({item.size} )?{item.colour} {item.shape}", caption):
            yield found.start(), found.end(), answers


def word_answers(
    tokenizer: PreTrainedTokenizerBase, captions: list[str], scenes: Sequence[Scene]
) -> Tensor:
    """The answers of every token: int64 (B, L, questions), `IGNORED` where it is of no name."""
    answers = torch.full((len(captions), MAX_TOKENS, len(QUESTIONS)), IGNORED)
    encoded = tokenizer(
        captions, padding="max_length", truncation=True, max_length=MAX_TOKENS,
        return_offsets_mapping=True, return_tensors="pt",
    )  # fmt: skip
    for row, (caption, scene) in enumerate(zip(captions, scenes, strict=True)):
        first, past = encoded["offset_mapping"][row].T
        for start, end, values in names(scene, caption):
            inside = (first >= start) & (past <= end) & (first < past)
            answers[row, inside] = torch.tensor(values)
    return answers


class Questions(nn.Linear):
    """Scores every answer to every question, from hidden states of `width`."""

    def __init__(self, width: int):
        super().__init__(width, sum(CHOICES))

    def losses(self, hidden: Tensor, answers: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the questions' losses, and the accuracy of each.

        Args:
            hidden: (B, L, width).
            answers: as `word_answers` has them.
        """
        named = answers[..., 0] != IGNORED
        scores = self(hidden[named]).split(CHOICES, dim=-1)
        losses, accuracies = zip(*map(cross_entropy, scores, answers[named].T), strict=True)
        return torch.stack(losses).sum(), dict(zip(QUESTIONS, accuracies, strict=True))


class Grounding:
    """`Questions` as the objective of a source: see `training.data.Objective`."""

    def module(self, width: int) -> Questions:
        return Questions(width)

    def loss(
        self, module: nn.Module, hidden: Tensor, targets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(module, Questions)
        return module.losses(hidden, targets)

    def targets(
        self, tokenizer: PreTrainedTokenizerBase, captions: list[str], truth: Sequence[Scene]
    ) -> Tensor:
        return word_answers(tokenizer, captions, truth)
