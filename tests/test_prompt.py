"""Tokens equal those of transformers, and truncation is reported."""

from types import SimpleNamespace

import numpy as np
import pytest
from harness import open_engine
from transformers import BertTokenizer, CLIPTokenizer

from twinbrush.engine.config import ENGINE, PipelineConfig
from twinbrush.engine.prompt import PromptTokenizer, TextTokenizer

PROMPTS = ["a large red circle", "A Café, ünïcode — and 数字 12!", "x", "very " * 40 + "long"]


@pytest.fixture(scope="module")
def tokenizer(repository):
    engine = open_engine(repository)
    engine.close()
    return engine._tokenizer


def test_ids_and_masks_are_those_of_transformers(tiny, tokenizer):
    tokens = tokenizer(PROMPTS)
    settings = {"padding": "max_length", "truncation": True, "max_length": 16,
                "return_tensors": "np"}  # fmt: skip
    clip = CLIPTokenizer.from_pretrained(tiny / "tokenizer")(PROMPTS, **settings)
    bert = BertTokenizer.from_pretrained(tiny / "bert_tokenizer")(PROMPTS, **settings)
    assert tokens["clip_text"].keys() == {"input_ids"}
    np.testing.assert_array_equal(tokens["clip_text"]["input_ids"], clip["input_ids"])
    np.testing.assert_array_equal(tokens["bert"]["input_ids"], bert["input_ids"])
    np.testing.assert_array_equal(tokens["bert"]["attention_mask"], bert["attention_mask"])


def test_only_truncated_texts_have_warnings(tokenizer):
    assert tokenizer.warnings("prompt", "a red circle") == []
    clip, bert = tokenizer.warnings("prompt", PROMPTS[-1])
    assert clip.startswith("prompt has ")
    assert clip.endswith(" tokens and was truncated to the 16 of clip_text")
    assert bert.endswith(" tokens and was truncated to the 16 of bert")


@pytest.mark.parametrize("content", [None, "{"])
def test_a_tokenizer_that_cannot_be_read_is_named(repository, tmp_path, content):
    config = PipelineConfig.load(repository / ENGINE / "pipeline.json")
    if content is not None:
        (tmp_path / "clip_tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"clip_tokenizer\.json cannot be read .*export"):
        PromptTokenizer(tmp_path, config)


def test_a_text_is_tokenized_once_and_its_ids_are_the_callers_own():
    calls = []

    def encode(text, add_special_tokens):
        calls.append((text, add_special_tokens))
        return SimpleNamespace(ids=[1, 2, 3] if add_special_tokens else [2])

    tokenizer = TextTokenizer(
        SimpleNamespace(encode=encode, num_special_tokens_to_add=lambda is_pair: 2)
    )
    tokenizer.ids("a circle").append(4)
    assert tokenizer.ids("a circle") == [1, 2, 3]
    assert tokenizer.ids("a circle", special=False) == [2]
    assert calls == [("a circle", True), ("a circle", False)]
