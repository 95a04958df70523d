"""A1111's prompt syntax: pictures equal diffusers', given embeddings that are made by hand."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from families import FAMILIES, Family
from harness import open_engine
from test_engine import Client, Watched, pixels, request
from test_families import draws, options_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertModel, BertTokenizer, CLIPTextModel, CLIPTokenizer

from checkpoints import TOKENS
from export.painting import paint
from networks.fusion_head import FusionHead
from twinbrush.engine.conditioning import Text, emphasize
from twinbrush.engine.fields import InvalidArgument
from twinbrush.engine.prompt import TextTokenizer, fill_chunks
from twinbrush.engine.prompt_syntax import has_syntax, parse, without_syntax
from twinbrush_client import Client as RemoteClient

LONG = "(large:1.3) red circle [left] of ((two)) stars on white BREAK green square on a white, blue"
# By hand: the words of each chunk, with their weights.
CHUNKS = [
    [("large", 1.3), ("red circle", 1.0), ("left", 1 / 1.1), ("of", 1.0), ("two", 1.1 * 1.1),
     ("stars on white", 1.0)],
    [("green square on a white, blue", 1.0)],
]  # fmt: skip
NEGATIVE, NEGATIVE_CHUNKS = "blue (square:0.4)", [[("blue", 1.0), ("square", 0.4)], []]


def encode_by_hand(tower, tokenizer, chunks, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted tokens (1, chunks·L, D) of a hidden state, and the first chunk's pooled text."""
    made, pooled = [], []
    for chunk in chunks:
        ids, weights = [tokenizer.bos_token_id], [1.0]
        for words, weight in chunk:
            tokens = tokenizer(words, add_special_tokens=False)["input_ids"]
            ids, weights = ids + tokens, weights + [weight] * len(tokens)
        ids += [tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (TOKENS - len(ids))
        weights += [1.0] * (TOKENS - len(weights))
        with torch.no_grad():
            out = tower(torch.tensor([ids]), output_hidden_states=True)
        tokens = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
        scaled = tokens * torch.tensor(weights)[None, :, None]
        has_mean = scaled.mean().abs() > 1e-3 * scaled.std()  # the tiny checkpoint's have none
        made.append(scaled * tokens.mean() / scaled.mean() if has_mean else scaled)
        pooled.append(out[0])
    return torch.cat(made, dim=1), pooled[0]


def embeds_by_hand(pipeline, family: Family, chunks) -> tuple[torch.Tensor, torch.Tensor]:
    if not family.xl:
        return encode_by_hand(pipeline.text_encoder, pipeline.tokenizer, chunks, -1)
    first, _ = encode_by_hand(pipeline.text_encoder, pipeline.tokenizer, chunks, -2)
    second, pooled = encode_by_hand(pipeline.text_encoder_2, pipeline.tokenizer_2, chunks, -2)
    return torch.cat([first, second], dim=-1), pooled


def paint_by_hand(source: Path, family: Family, monkeypatch) -> np.ndarray:
    pipeline = getattr(diffusers, family.pipeline).from_pretrained(source, **options_of(family))
    pipeline.set_progress_bar_config(disable=True)
    draw = draws()
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", draw)
    embeds, pooled = embeds_by_hand(pipeline, family, CHUNKS)
    given = {"prompt_embeds": embeds}
    if "LatentConsistency" not in family.pipeline:
        given["negative_prompt_embeds"], negative_pooled = embeds_by_hand(
            pipeline, family, NEGATIVE_CHUNKS
        )
        if family.xl:
            given |= {"pooled_prompt_embeds": pooled,
                      "negative_pooled_prompt_embeds": negative_pooled}  # fmt: skip
    return 255 * pipeline(
        num_inference_steps=family.steps, guidance_scale=family.guidance_scale, latents=draw(),
        output_type="np", **given,
    ).images[0]  # fmt: skip


def strings(**fields: str) -> dict[str, np.ndarray]:
    return {name: np.array([text.encode()], object) for name, text in fields.items()}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("runwayml/stable-diffusion-v1-5", marks=pytest.mark.slow),
        "stabilityai/stable-diffusion-xl-base-1.0",
        "SimianLuo/LCM_Dreamshaper_v7",
    ],
)
def test_weighted_long_prompts_paint_what_diffusers_paints(name, exported, monkeypatch):
    source, repository = exported(name)
    family = FAMILIES[name]
    distilled = "LatentConsistency" in family.pipeline
    fields = strings(negative_prompt="" if distilled else NEGATIVE, prompt_syntax="a1111")
    fields |= {"steps": np.array([family.steps])}
    fields |= {"guidance_scale": np.array([family.guidance_scale])}
    engine = open_engine(repository)
    (ours,) = paint(engine, [LONG], **fields)
    (plain,) = paint(engine, [LONG], **fields | strings(prompt_syntax="plain"))
    engine.close()
    theirs = paint_by_hand(source, family, monkeypatch)
    assert np.abs(ours - theirs).max() <= 2
    assert np.abs(plain - theirs).max() > 2


def test_each_chunk_is_fused_with_the_text_models_tokens_of_the_whole_text(tiny, engine):
    (encoded,) = engine._conditioner([[Text(LONG, syntax="a1111")]])
    tower = CLIPTextModel.from_pretrained(tiny / "text_encoder")
    tokens, _ = encode_by_hand(tower, CLIPTokenizer.from_pretrained(tiny / "tokenizer"), CHUNKS, -1)
    words = BertTokenizer.from_pretrained(tiny / "bert_tokenizer")(
        without_syntax(LONG), padding="max_length", truncation=True, max_length=TOKENS,
        return_tensors="pt",
    )  # fmt: skip
    head = FusionHead.from_pretrained(tiny / "fusion")
    with torch.no_grad():
        states = BertModel.from_pretrained(tiny / "bert")(**words, output_hidden_states=True)
        bert = torch.stack([states.hidden_states[i] for i in head.config.bert_layers], dim=1)
        chunks = [head(part, bert, words["attention_mask"]) for part in tokens.chunk(2, dim=1)]
    fused = torch.cat(chunks, dim=1).numpy()
    np.testing.assert_allclose(encoded["encoder_hidden_states"], fused, atol=1e-4)


def test_prompts_of_different_lengths_never_share_a_call(repository, caplog):
    watched = Watched(repository)
    engine = open_engine(repository, watched)
    fields = {"steps": 3, "prompt_syntax": "a1111"}
    prompts = [LONG, "a (red:1.4) circle", f"{LONG} BREAK two", "a circle", f"blue {LONG}"]
    wanted = [request(engine, prompt, seed=k, **fields) for k, prompt in enumerate(prompts)]
    alone = [Client(engine, each).images[0] for each in wanted]
    together = [Client(engine, each) for each in wanted]
    for client, image in zip(together, alone, strict=True):
        assert np.abs(pixels(client.images[0]) - pixels(image)).max() <= 1
    assert "failed" not in caplog.text
    assert len(set(alone)) == len(alone)
    engine.close()


def test_chunks_of_many_prompts_are_encoded_in_calls_that_the_models_take(repository):
    engine = open_engine(repository, Watched(repository))
    run, rows = engine._conditioner._models.run, []

    def watch(model, inputs):
        rows.append(len(next(iter(inputs.values()))))
        return run(model, inputs)

    engine._conditioner._models.run = watch  # type: ignore[method-assign]
    engine._conditioner._max_rows = 4
    texts = [Text(" BREAK ".join(["red"] * 3 + [word]), syntax="a1111") for word in "abc"]
    (many,) = engine._conditioner([texts])
    assert max(rows) == 4
    for text, row in zip(texts, many["encoder_hidden_states"], strict=True):
        (single,) = engine._conditioner([[Text(text.text, True, text.syntax)]])
        np.testing.assert_allclose(row, single["encoder_hidden_states"][0], atol=1e-5)
    engine.close()


def test_syntax_is_part_of_what_is_cached_and_deterministic(engine):
    images = {}
    for syntax in ("plain", "a1111", "plain", "a1111"):
        wanted = request(engine, "a (red:1.9) circle", prompt_syntax=syntax, deterministic=True)
        images.setdefault(syntax, set()).add(Client(engine, wanted).images[0])
    assert [len(found) for found in images.values()] == [1, 1]
    assert images["plain"] != images["a1111"]


@pytest.mark.parametrize(
    ("text", "sections"),
    [
        ("a (red) [blue]", [[("a ", 1.0), ("red", 1.1), (" ", 1.0), ("blue", 1 / 1.1)]]),
        ("((a:1.5))", [[("a", 1.5 * 1.1)]]),
        ("(a (b:2) c:0.5)", [[("a ", 0.5), ("b", 1.0), (" c", 0.5)]]),
        (r"a \(red\) \[b\] \\ \d", [[("a (red) [b] \\ \\d", 1.0)]]),
        ("a BREAK b BREAKS", [[("a", 1.0)], [("b BREAKS", 1.0)]]),
        ("(a BREAK b:1.2)", [[("a", 1.2)], [("b", 1.2)]]),
        ("(open", [[("open", 1.1)]]),
        ("shut) [ a", [[("shut) ", 1.0), (" a", 1 / 1.1)]]),
        ("at 5:30) (f:x)", [[("at 5:30) ", 1.0), ("f:x", 1.1)]]),
        ("(a: -1 )", [[("a", -1.0)]]),
        ("", [[]]),
    ],
)
def test_weights_escapes_and_breaks(text, sections):
    assert parse(text) == sections
    assert has_syntax(text) == (sections not in ([[(text, 1.0)]], [[]]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "(a:1.2.3)"}, r"prompt='\(a:1.2.3\)' is invalid: its weight 1.2.3 must be a n"),
        ({"prompt": "(a:11)"}, "the weight of 'a' is 11, it must be between -10 and 10"),
        ({"prompt": "(" * 1900 + "a"}, r"the weight of 'a' is .*e\+78, it must be between"),
        ({"negative_prompt": "(b:.)"}, r"negative_prompt='\(b:.\)' is invalid: its weight . must"),
        ({"prompt_syntax": "compel"}, "must be one of plain, a1111"),
    ],
)
def test_weights_that_cannot_be_are_refused(engine, fields, message):
    with pytest.raises(InvalidArgument, match=message):
        request(engine, **{"prompt": "a", "prompt_syntax": "a1111"} | fields)


def test_full_chunks_end_at_a_near_comma():
    words = ["red", "circle", "two", "stars", "on", "white", "a", "b", ","]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = Whitespace()

    def filled(text, length):
        chunks = fill_chunks(TextTokenizer(tokenizer), text, length)
        return [" ".join(words[token] for token, _ in chunk) for chunk in chunks]

    assert filled("red circle, two stars on white", 6) == ["red circle ,", "two stars on white"]
    assert filled("red circle two stars on white", 6) == ["red circle two stars", "on white"]
    assert filled("red circle two stars, white", 6) == ["red circle two stars", ", white"]
    far = filled("red, " + "red " * 30, 24)  # the comma is 21 tokens away
    assert far == ["red , " + " ".join(["red"] * 20), " ".join(["red"] * 10)]
    assert filled("a BREAK BREAK b BREAK", 6) == ["a", "", "b"]
    assert filled("", 6) == [""]


def test_tokens_without_a_mean_are_weighted_alone():
    tokens = np.array([[[1, -1], [2, -2]]], np.float32)
    found = emphasize(tokens, np.array([[1, 3]], np.float32))
    assert np.array_equal(found, [[[1, -1], [6, -6]]])


def test_emphasis_keeps_the_mean_of_each_chunk():
    tokens = np.random.default_rng(0).normal(0.3, 1, (2, 4, 8)).astype(np.float32)
    weights = np.array([[1, 1, 1, 1], [1, 2, 0.5, 1]], np.float32)
    found = emphasize(tokens, weights)
    assert np.array_equal(found[0], tokens[0])
    assert found[1].mean() == pytest.approx(tokens[1].mean(), rel=1e-5)
    ratio = (found[1] / tokens[1]).mean(axis=1)
    np.testing.assert_allclose(ratio / ratio[0], weights[1], rtol=1e-5)


def test_warnings_tell_literal_syntax_and_truncated_chunks(engine):
    def warnings(prompt, syntax):
        wanted = request(engine, prompt, prompt_syntax=syntax, steps=1, guidance_scale=1.0)
        return Client(engine, wanted).wait().generation.warnings

    (literal,) = warnings("a (red:1.2) circle", "plain")
    assert literal.startswith("prompt has weights or breaks, which are read literally")
    assert warnings("a (red:1.2) circle", "a1111") == ()
    assert warnings("a red circle: 5) done", "plain") == ()
    truncated = warnings(" BREAK ".join("abcdefghij"), "a1111")
    assert truncated == ("prompt has 10 chunks of tokens and was truncated to the 8 of clip_text",)
    (bert,) = warnings("red circle " * 10, "a1111")
    assert bert.endswith("was truncated to the 16 of bert")


def test_the_server_takes_the_syntax_and_warns_where_it_is_off(server):
    with RemoteClient(server.address) as client:
        weighted, plain = (
            [*client.stream(LONG, seed=1, steps=2, prompt_syntax=syntax)][-1]
            for syntax in ("a1111", None)
        )
    assert "read literally" in plain.warning
    assert "literally" not in weighted.warning
    assert np.abs(np.asarray(weighted.image, int) - np.asarray(plain.image, int)).max() > 2
