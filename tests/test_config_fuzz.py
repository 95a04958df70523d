"""Configurations with wrong values: a checkpoint opens, or one sentence says why it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import FAMILIES, shallow, write_family
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import text_model
from export.checkpoint import open_checkpoint
from export.pipeline import PART_OF_TOKENIZER
from export.repository import load_outlines
from export.tokenizer import load_tokenizer
from networks.loading import CheckpointError

XL = "stabilityai/stable-diffusion-xl-base-1.0"
VOCABULARIES = ("vocab.json", "tokenizer.json")
EXTRA = ("unknown_field", "defaults", "loras", "latent_to_rgb", "quantization_config", "auto_map")
ABSENT = object()
WRONG = st.sampled_from(
    [ABSENT, None, "words", [], [1], {}, {"a": 1}, -1, 0, 10**12, 1.5, True, ["a", "b"],
     float("inf"), float("nan"), 1e-30, "../..", [[[]]], "9" * 5000]
)  # fmt: skip
LONGEST = 600  # characters of a sentence, of which paths are a part


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint as SDXL, and a text model."""
    root = tmp_path_factory.mktemp("fuzz")
    return write_family(root / "xl", shallow(FAMILIES[XL])), text_model(root / "bert", "bert")


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_wrong_field_is_served_or_refused_in_one_sentence(folders, data):
    files = sorted(
        file for root in folders for file in root.rglob("*.json") if file.name not in VOCABULARIES
    )
    file = data.draw(st.sampled_from(files), label="file")
    good = json.loads(file.read_text())
    field = data.draw(st.sampled_from([*good, *EXTRA]), label="field")
    wrong = data.draw(WRONG, label="wrong")
    changed = good | {field: wrong}
    if wrong is ABSENT:
        del changed[field]
    file.write_text(json.dumps(changed))
    try:
        text = refusal(*folders)
    finally:
        file.write_text(json.dumps(good))
    assert "\n" not in text
    assert len(text) < LONGEST
    if text:
        assert file.name in text or file.parent.name in text or field in text
    of_a_number = type(good.get(field)) in (bool, int, float, list)
    if text and wrong == {"a": 1} and of_a_number:
        assert field in text


def refusal(checkpoint: Path, bert: Path) -> str:
    """Why a checkpoint is refused before a weight is read; empty where it is not."""
    try:
        opened = open_checkpoint(checkpoint, bert)
        load_outlines(opened)
        for part in PART_OF_TOKENIZER:
            if part in opened.folders:
                load_tokenizer(opened, part)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("tokenizer/special_tokens_map.json", {"bos_token": None}, r"bos_token=None is invalid"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 4}, r"model_max_length=4 is inv"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "x"}, r"model_max_length='x' is"),
        ("tokenizer/tokenizer_config.json", {"padding_side": "left"}, "padding_side='left' is not"),
        ("tokenizer/tokenizer_config.json", {"truncation_side": "left"}, "must be right"),
        ("text_encoder/config.json", {"dtype": [1]}, r"dtype=\[1\] is invalid: must be a text"),
        ("text_encoder_2/config.json", {"eos_token_id": None}, "eos_token_id=None is invalid"),
        ("text_encoder_2/config.json", {"eos_token_id": [1]}, r"eos_token_id=\[1\] is invalid"),
        ("unet/config.json", {"norm_num_groups": None}, "norm_num_groups=None is invalid"),
        ("vae/config.json", {"block_out_channels": [1]}, r"block_out_channels=\[1\] is invalid"),
        ("model_index.json", {"defaults": {"a": 1}}, r"model_index\.json: default a=1 is invalid"),
    ],
)
def test_the_field_that_is_wrong_is_named(folders, name, fields, message):
    file = folders[0] / name
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | fields))
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint(*folders)
    finally:
        file.write_text(before)
    assert name.split("/")[-1] in str(caught.value)


@pytest.mark.parametrize("tokenizer_class", [None, "LlamaTokenizer", 3, ABSENT])
def test_clips_tokenizer_is_of_the_class_that_the_checkpoint_names(folders, tokenizer_class):
    """As in diffusers, which does not read the class of the files."""
    file = folders[0] / "tokenizer" / "tokenizer_config.json"
    before = file.read_text()
    good = load_tokenizer(open_checkpoint(*folders), "tokenizer")("a Star!")["input_ids"]
    settings = json.loads(before) | {"tokenizer_class": tokenizer_class}
    if tokenizer_class is ABSENT:
        del settings["tokenizer_class"]
    file.write_text(json.dumps(settings))
    try:
        tokenizer = load_tokenizer(open_checkpoint(*folders), "tokenizer")
    finally:
        file.write_text(before)
    assert tokenizer("a Star!")["input_ids"] == good
