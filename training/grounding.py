"""What the words of a scene's caption name, and where it stands: the truth that BERT learns from.

Masked words teach which words go together; they hardly teach whether it is the circle or the
square that is on the left. As MDETR (arXiv:2104.12763) has it, every word of an object's name is
tied to the object. This module knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from training.scenes import COLOURS, OPPOSITE, SHAPES, SIZES, Scene, middle_item, relation

# What is asked of each word of an object's name, and what can be answered.
QUESTIONS = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "place": (*OPPOSITE, "between", "outside", "alone"),
}
UNASKED = -100  # what torch's cross entropy leaves out


def place(scene: Scene, index: int, caption: str) -> str:
    """Where an object stands to the one that the caption names it with."""
    if len(scene.items) == 1:
        return "alone"
    if "between" in caption:
        return "between" if index == middle_item(scene) else "outside"
    link = relation(scene.items[index], scene.items[0 if index == 1 else 1])
    assert link is not None, "sample_scene chains its objects by clear relations"
    return link


def names(scene: Scene, caption: str) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Where the caption names an object, from one character to before another, and the answers.

    Answers are indices, one a question.
    """
    for index, item in enumerate(scene.items):
        said = (item.shape, item.colour, item.size, place(scene, index, caption))
        answers = tuple(
            choices.index(one) for choices, one in zip(QUESTIONS.values(), said, strict=True)
        )
        for found in re.finditer(f"({item.size} )?{item.colour} {item.shape}", caption):
            yield found.start(), found.end(), answers


def word_answers(scenes: list[Scene], captions: list[str], offsets: np.ndarray) -> np.ndarray:
    """Answers for every token: int64 (B, L, questions), `UNASKED` for words that name no object.

    Args:
        offsets: (B, L, 2), each token's first character and the one after its last; equal for
            tokens that stand for no text.
    """
    answers = np.full((*offsets.shape[:2], len(QUESTIONS)), UNASKED, np.int64)
    starts, ends = offsets[..., 0], offsets[..., 1]
    for row, (scene, caption) in enumerate(zip(scenes, captions, strict=True)):
        for start, end, said in names(scene, caption):
            inside = (starts[row] >= start) & (ends[row] <= end) & (starts[row] < ends[row])
            answers[row, inside] = said
    return answers
