"""The words of a caption are tied to the right objects."""

from __future__ import annotations

import csv
import itertools
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from training import bert, data
from training.grounding import QUESTIONS, UNASKED, names, place, word_answers
from training.run import Run
from training.scenes import Item, Scene, describe, sample_scene

PAIR = Scene(
    (Item("circle", "red", "small", 12, 30), Item("square", "blue", "large", 48, 33)), "white"
)
WORDS = "a red circle is left of the large blue square"


def answered(scene: Scene, caption: str) -> dict[str, tuple[str, ...]]:
    choices = list(QUESTIONS.values())
    return {
        caption[start:end]: tuple(c[i] for c, i in zip(choices, answers, strict=True))
        for start, end, answers in names(scene, caption)
    }


def test_every_name_says_what_it_names_and_where_that_stands():
    assert answered(PAIR, "on white, a large blue square with a red circle on its left") == {
        "red circle": ("circle", "red", "small", "left of"),
        "large blue square": ("square", "blue", "large", "right of"),
    }


def test_a_row_has_a_middle_and_two_outer_ones():
    third = Item("star", "pink", "large", 30, 31)
    row = Scene((*PAIR.items, third), "black")
    caption = "between a red circle and a blue square there is a pink star"
    assert [place(row, k, caption) for k in range(3)] == ["outside", "outside", "between"]
    chained = "a red circle left of a blue square, and a pink star left of the blue square"
    assert [place(row, k, chained) for k in range(3)] == ["left of", "right of", "left of"]


@given(st.integers(0, 10**9))
@settings(max_examples=100, deadline=None)
def test_every_object_is_named_and_names_do_not_overlap(seed):
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    found = sorted(names(scene, describe(scene, rng)))
    assert {answers[:3] for *_, answers in found} == {
        (
            QUESTIONS["shape"].index(item.shape),
            QUESTIONS["colour"].index(item.colour),
            QUESTIONS["size"].index(item.size),
        )
        for item in scene.items
    }
    assert all(a[1] < b[0] for a, b in itertools.pairwise(found))


def test_only_words_of_names_are_asked():
    starts = [0, *(i + 1 for i, letter in enumerate(WORDS) if letter == " ")]
    offsets = np.array([(0, 0)] + [(s, s + len(WORDS[s:].split()[0])) for s in starts] + [(0, 0)])
    answers = word_answers([PAIR], [WORDS], offsets[None])[0]
    asked = [WORDS[s:e] for (s, e), row in zip(offsets, answers, strict=True) if row[0] != UNASKED]
    assert asked == ["red", "circle", "large", "blue", "square"]
    assert (answers[offsets[:, 0] == offsets[:, 1]] == UNASKED).all()


class MirroredPair(data.SceneWorld):
    """Two scenes, where objects traded places and captions one word, over and over."""

    def batches(self, *_, **__):
        return self

    position = None

    def at(self, step):
        mirrored = replace(PAIR, items=tuple(replace(i, x=60 - i.x) for i in PAIR.items))
        texts = [WORDS, WORDS.replace("left", "right")]
        return data.Batch(data.no_pictures(), texts * 8, [PAIR, mirrored] * 8)

    def report(self):
        return ""

    def close(self):
        """Nothing was started."""


def test_bert_learns_what_no_word_says_alone(tmp_path):
    bert.train(Run(tmp_path, tmp_path / "runs", 60, 16, source=MirroredPair(), save_every=60))
    curve = list(csv.DictReader((tmp_path / "runs" / "bert" / "losses.csv").open()))
    assert float(curve[0]["place"]) < 0.9
    assert float(curve[-1]["place"]) == 1
