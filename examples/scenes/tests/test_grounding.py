"""The words of a caption are tied to the right objects."""

from __future__ import annotations

import csv
import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import BertTokenizer, CLIPTokenizer

from examples.scenes.grounding import (
    NOBODY,
    QUESTIONS,
    Questions,
    names,
    partner,
    place,
    word_answers,
)
from examples.scenes.scenes import HELD_OUT, Item, Scene, describe, sample_scene
from examples.scenes.world import SceneBatches, SceneWorld
from training import bert, data, run
from training.losses import IGNORED, cross_entropy

Run = partial(run.Run, source=SceneWorld())
PAIR = Scene(
    (Item("circle", "red", "small", 12, 30), Item("square", "blue", "large", 48, 33)), "white"
)
WORDS = "a red circle is left of the large blue square"
UNNAMED = "unnamed"


def answered(scene: Scene, caption: str) -> dict[str, tuple[str, ...]]:
    choices = [dict(enumerate(c)) | {IGNORED: UNNAMED} for c in QUESTIONS.values()]
    return {
        caption[start:end]: tuple(c[i] for c, i in zip(choices, answers, strict=True))
        for start, end, answers in names(scene, caption)
    }


def test_every_name_says_what_it_names_and_where_that_stands():
    assert answered(PAIR, "on white, a large blue square with a red circle on its left") == {
        "red circle": ("circle", "red", UNNAMED, "left of", "square", "blue"),
        "large blue square": ("square", "blue", "large", "right of", "circle", "red"),
    }


def test_an_object_alone_has_no_partner():
    alone = replace(PAIR, items=PAIR.items[:1])
    assert answered(alone, "a red circle") == {
        "red circle": ("circle", "red", UNNAMED, "alone", NOBODY, NOBODY)
    }


def test_a_size_named_once_is_known_where_the_name_returns():
    row = Scene((*PAIR.items, Item("star", "pink", "large", 50, 55)), "white")
    caption = f"{WORDS}; a pink star is below the blue square"
    sizes = {name: said[2] for name, said in answered(row, caption).items()}
    assert sizes == {
        "red circle": UNNAMED,
        "large blue square": "large",
        "pink star": UNNAMED,
        "blue square": "large",
    }


def test_a_row_has_a_middle_and_two_outer_ones():
    third = Item("star", "pink", "large", 30, 31)
    row = Scene((*PAIR.items, third), "black")
    caption = "between a red circle and a blue square there is a pink star"
    assert [place(row, k, caption) for k in range(3)] == ["outside", "outside", "between"]
    chained = "a red circle left of a blue square, and a pink star left of the blue square"
    assert [place(row, k, chained) for k in range(3)] == ["left of", "right of", "left of"]
    assert [partner(row, k, caption) for k in range(3)] == [third, third, None]
    assert [partner(row, k, chained) for k in range(3)] == [PAIR.items[1], *PAIR.items]


@given(st.integers(0, 10**9))
@settings(max_examples=100)
def test_every_object_is_named_and_names_do_not_overlap(seed):
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    caption = describe(scene, rng)
    found = sorted(names(scene, caption))
    assert {answers[:3] for *_, answers in found} == {
        (
            QUESTIONS["shape"].index(item.shape),
            QUESTIONS["colour"].index(item.colour),
            QUESTIONS["size"].index(item.size)
            if f"{item.size} {item.colour} {item.shape}" in caption
            else IGNORED,
        )
        for item in scene.items
    }
    assert all(a[1] < b[0] for a, b in itertools.pairwise(found))


@pytest.mark.parametrize(
    ("part", "kind"), [("tokenizer", CLIPTokenizer), ("bert_tokenizer", BertTokenizer)]
)
def test_only_words_of_names_are_asked(part, kind):
    tokenizer = kind.from_pretrained(f"checkpoints/scenes-64/{part}")
    (answers,) = word_answers(tokenizer, [WORDS], [PAIR])
    ids, _ = data.token_ids(tokenizer, [WORDS])
    asked = ids[0][answers[:, 0] != IGNORED]
    assert tokenizer.decode(asked).split() == ["red", "circle", "large", "blue", "square"]
    left, right = (QUESTIONS["place"].index(side) for side in ("left of", "right of"))
    assert answers[answers[:, 3] != IGNORED][:, 3].tolist() == [left] * 2 + [right] * 3


def test_questions_are_answered_at_the_words_of_names_alone():
    questions = Questions(4)
    hidden = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    answers = torch.full((2, 5, len(QUESTIONS)), IGNORED)
    loss, _ = questions.losses(hidden, answers)
    assert loss == 0
    answers[1, 2] = torch.tensor([0, 1, 1, 3, 2, 0])
    loss, accuracies = questions.losses(hidden, answers)
    loss.backward()
    assert list(accuracies) == list(QUESTIONS)
    heard = hidden.grad.abs().sum(-1) > 0
    assert heard.nonzero().tolist() == [[1, 2]]


def test_answers_are_counted_among_those_that_were_asked():
    scores = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    right = torch.tensor([0, IGNORED, 0])
    loss, accuracy = cross_entropy(scores, right)
    assert accuracy == 0.5
    torch.testing.assert_close(loss, F.cross_entropy(scores[[0, 2]], right[[0, 2]]))


class MirroredPair(SceneWorld):
    """Two scenes, where objects traded places and captions one word, over and over."""

    def batches(self, *_, **__):
        return self

    position = None

    def at(self, step):
        mirrored = replace(PAIR, items=tuple(replace(i, x=60 - i.x) for i in PAIR.items))
        texts = [WORDS, WORDS.replace("left", "right")]
        return data.Batch(data.no_pictures(64), texts * 8, [PAIR, mirrored] * 8)

    def report(self):
        return ""

    def close(self):
        """Nothing was started."""


def test_bert_learns_further_from_the_weights_that_init_names(tmp_path):
    started = Run(tmp_path / "new", tmp_path / "runs", 1, 4, init=Path("checkpoints/scenes-64"))
    bert.train(started)  # one step of warming up moves nothing far
    before, after = (
        load_file(folder / "bert" / "model.safetensors")
        for folder in (started.init, started.checkpoint)
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0.01)
    vocabularies = [
        BertTokenizer.from_pretrained(folder / "bert_tokenizer").get_vocab()
        for folder in (started.init, started.checkpoint)
    ]
    assert vocabularies[0] == vocabularies[1]
    missing = f"--init: {tmp_path}/bert_tokenizer is no tokenizer to start from"
    with pytest.raises(data.BadInput, match=missing):
        bert.train(replace(started, init=tmp_path))


@pytest.mark.slow
def test_bert_learns_what_no_word_says_alone(tmp_path):
    bert.train(Run(tmp_path, tmp_path / "runs", 60, 16, source=MirroredPair(), save_every=60))
    curve = list(csv.DictReader((tmp_path / "runs" / "bert" / "losses.csv").open()))
    assert float(curve[0]["place"]) < 0.9
    assert float(curve[-1]["place"]) == 1


@pytest.mark.slow
def test_bert_never_reads_the_size_of_what_training_shows_in_one_alone(tmp_path, monkeypatch):
    read = []
    at = SceneBatches.at
    monkeypatch.setattr(
        SceneBatches, "at", lambda self, step: read.append(at(self, step)) or read[-1]
    )
    bert.train(Run(tmp_path, tmp_path / "runs", 5, 100))
    captions = [caption for batch in read for caption in batch.captions]
    named = [c for c in captions for shape, colour, _ in HELD_OUT if f"{colour} {shape}" in c]
    assert named
    assert not [c for c in named for s, k, _ in HELD_OUT if f"large {k} {s}" in c]
