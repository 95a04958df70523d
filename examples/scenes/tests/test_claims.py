"""The benchmarks of what the project claims, run in full on few steps and prompts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image, ImageFilter
from safetensors.torch import save_file

from checkpoints import tiny_checkpoint
from examples.scenes import quality, world
from examples.scenes.benchmarks import (
    diversity,
    fusion,
    losses,
    outlines,
    pictures,
    steps,
    tokens,
    training_time,
)
from examples.scenes.benchmarks.tokens import answers_of
from examples.scenes.reader import read
from examples.scenes.scenes import Item, Scene, render
from training import bert, clip, data, diffusion
from training.losses import IGNORED
from training.run import digest

CHECKPOINT = Path("checkpoints/scenes-64")


@pytest.mark.slow
def test_every_arm_of_fusion_is_trained_and_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(world, "SCENES", 100)
    out = tmp_path / "fusion.json"
    given = {"steps": 2, "batch": 4, "seeds": 2, "device": "cpu", "bf16": False, "n": 3}
    with pytest.raises(SystemExit, match="--channels: 40 is not a multiple of 32"):
        fusion.main(CHECKPOINT, tmp_path / "runs", **given, channels=40, threads=1, out=out)
    fusion.main(CHECKPOINT, tmp_path / "runs", **given, channels=32, threads=1, out=out)
    result = json.loads(out.read_text())
    assert result["channels"] == 32
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result["summary"]
    assert list(result["results"]) == list(fusion.ARMS)
    behind = result["summary"]["behind_fusion"]
    assert {arm: len(found) for arm, found in behind.items()} == {"clip": 2, "bert": 2}
    for tables in result["results"].values():
        assert [table["all"]["all_correct"]["n"] for table in tables] == [3, 3]
    assert Image.open(out.with_suffix(".png")).size[0] > 500


@pytest.mark.slow
def test_fusion_can_be_measured_behind_a_bert_of_masked_words(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "SCENES", 100)
    monkeypatch.setattr(fusion, "MASKED_WORDS_STEPS", 2)
    out, runs = tmp_path / "fusion.json", tmp_path / "runs"
    given = {"steps": 1, "batch": 4, "seeds": 1, "device": "cpu", "bf16": False, "n": 3}
    with pytest.raises(SystemExit, match="--arm: vae is not one of clip, bert, fusion"):
        fusion.main(CHECKPOINT, runs, **given, channels=32, threads=1, out=out, arm=["vae"])
    before = digest([CHECKPOINT / "bert"])
    fusion.main(
        CHECKPOINT, runs, **given, channels=32, threads=1, out=out, arm=["bert"], masked_words=True
    )
    result = json.loads(out.read_text())
    assert result["checkpoint"] == "scenes-64"
    assert result["masked_words"]
    assert list(result["results"]) == ["bert"]
    assert result["summary"]["behind_fusion"] == {}
    learnt = runs / "masked-words"
    heading = (learnt / "bert" / "losses.csv").read_text().splitlines()[0]
    assert heading == "step,loss,words,accuracy"  # no question was asked
    made = digest([learnt / "scenes-64" / "bert"])
    assert digest([CHECKPOINT / "bert"]) == before != made


def test_arms_start_from_a_unet_that_has_yet_to_learn_to_read(tmp_path):
    saved = UNet2DConditionModel.from_pretrained("checkpoints/scenes-64-teacher", subfolder="unet")
    started = diffusion.Painter().unet
    fresh = {key: value.clone() for key, value in started.state_dict().items()}
    fusion.start(started, Path("checkpoints/scenes-64-teacher"))
    for key, value in started.state_dict().items():
        expected = fresh if ".attn2." in key else saved.state_dict()
        assert torch.equal(value, expected[key]), key
    with pytest.raises(
        data.BadInput, match=r"--init: .*scenes-64/unet is no UNet to start from: .*cond_proj"
    ):
        fusion.start(started, CHECKPOINT)
    with pytest.raises(data.BadInput, match=r"--init: .* is no UNet to start from: size mismatch"):
        fusion.start(diffusion.Painter(channels=32).unet, Path("checkpoints/scenes-64-teacher"))


def test_every_arm_of_fusion_sees_what_it_says():
    arms = {name: fusion.Arm(CHECKPOINT, name, torch.device("cpu")) for name in fusion.ARMS}
    caption = ["a red circle is left of the blue square"]
    seen = {name: arm(caption) for name, arm in arms.items()}
    tokens, layers = ({name: s[i] for name, s in seen.items()} for i in (0, 1))
    assert torch.equal(tokens["fusion"], tokens["clip"])
    assert torch.equal(layers["fusion"], layers["bert"])
    ids, mask = data.token_ids(arms["bert"].bert_tokenizer, caption)
    with torch.no_grad():
        last = arms["bert"].bert(ids, attention_mask=mask).last_hidden_state
    assert torch.equal(tokens["bert"], last)
    assert torch.equal(seen["bert"][2], mask)
    assert torch.equal(seen["fusion"][2], mask)
    assert not torch.equal(tokens["bert"], tokens["clip"])
    assert not torch.equal(layers["clip"], layers["bert"])
    named = Item("circle", "red", "large", 18, 32), Item("square", "blue", "small", 46, 32)
    for name, arm in arms.items():
        tokenizer = arm.bert_tokenizer if name == "bert" else arm.tokenizer
        asked = answers_of(arm, caption, [Scene(named, "black")])[0, :, 0] != IGNORED
        ids, _ = data.token_ids(tokenizer, caption)
        assert tokenizer.decode(ids[0, asked]).split() == ["red", "circle", "blue", "square"]
    for parameter in arms["clip"].bert.parameters():
        parameter.data.zero_()
    for now, before in zip(arms["clip"](caption), seen["clip"], strict=True):
        assert torch.equal(now, before)


def test_a_sheet_of_pictures_has_a_row_for_each_number_of_objects(repository, tmp_path):
    pictures.main(repository, tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png")
    tile = pictures.TILE + pictures.MARGIN
    assert sheet.width == pictures.MARGIN + pictures.COLUMNS * tile
    for row in range(3):
        y = pictures.MARGIN + row * (pictures.TILE + pictures.CAPTION) + pictures.TILE // 2
        shown = {sheet.getpixel((tile * column + 30, y)) for column in range(pictures.COLUMNS)}
        assert len(shown) > 1


@pytest.mark.slow
def test_training_time_is_that_of_a_stages_own_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_time, "STAGES", (bert,))
    out = tmp_path / "time.json"
    given = {"batch": 4, "device": "cpu", "bf16": False}
    training_time.main(few=2, save_every=4, **given, out=out)
    found = json.loads(out.read_text())["stages"]["bert"]
    assert found["steps"] == bert.STEPS
    seconds = found["seconds_beside"] + found["seconds_a_step"] * bert.STEPS
    assert found["minutes"] == pytest.approx(seconds / 60, abs=0.1)
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary == {"minutes": found["minutes"], "goal": 150.0}


def test_training_time_is_what_a_run_of_all_took(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_time, "STAGES", (clip, bert))
    monkeypatch.setattr(bert, "STEPS", 7)
    given = {"runs": tmp_path, "device": "cpu", "bf16": True, "out": tmp_path / "time.json"}
    (tmp_path / "times.json").write_text('{"clip": 90.0, "bert": 60.0}')
    last = tmp_path / "bert" / "state.safetensors"
    with pytest.raises(SystemExit, match=r"bert/state.safetensors has 0 steps of 7: it has not"):
        training_time.main(**given)
    last.parent.mkdir()
    save_file({}, last, {"step": "6"})
    with pytest.raises(SystemExit, match=r"has 6 steps of 7"):
        training_time.main(**given)
    assert not given["out"].exists()
    save_file({}, last, {"step": "7"})
    training_time.main(**given)
    found = json.loads(given["out"].read_text())
    assert found["stages"]["bert"] == {"steps": 7, "batch": bert.BATCH, "minutes": 1.0}
    assert found["stages"]["clip"] == {"steps": clip.STEPS, "batch": clip.BATCH, "minutes": 1.5}
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary == found["summary"] == {"minutes": 2.5, "goal": 150.0}


@pytest.mark.slow
def test_every_decoder_of_losses_is_trained_and_measured(tmp_path, capsys):
    out = tmp_path / "losses.json"
    given = {"steps": 2, "batch": 4, "device": "cpu", "bf16": False, "n": 6, "threads": 1}
    losses.main(CHECKPOINT, tmp_path / "runs", **given, out=out)
    results = json.loads(out.read_text())["results"]
    assert list(results) == list(losses.VARIANTS)
    assert len({found["psnr"] for found in results.values()}) > 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
    for name in ("losses.png", "losses_pictures.png"):
        assert Image.open(tmp_path / name).size[0] > 1000
    saved = tmp_path / "runs" / "2x4" / "both" / "vqgan" / "state.safetensors"
    before = saved.stat().st_mtime_ns
    losses.main(CHECKPOINT, tmp_path / "runs", **given, out=out)
    assert saved.stat().st_mtime_ns == before  # it went on from its last save, the end
    assert json.loads(out.read_text())["results"] == results


@pytest.mark.slow
def test_decoders_of_losses_can_go_on_from_the_checkpoints(tmp_path):
    out = tmp_path / "losses.json"
    given = {"steps": 10, "batch": 8, "device": "cpu", "bf16": False, "n": 6, "threads": 1}
    losses.main(CHECKPOINT, tmp_path / "runs", **given, further=True, out=out)
    psnr = {name: found["psnr"] for name, found in json.loads(out.read_text())["results"].items()}
    assert list(psnr) == ["before", *losses.VARIANTS]
    assert min(psnr.values()) > 28  # a fresh decoder after ten steps is far below


@pytest.mark.slow
def test_steps_are_measured_of_student_and_teacher(tiny, repository, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "read", lambda picture: read(np.tile(picture, (2, 2, 1))))
    monkeypatch.setattr(steps, "STEPS", (1, 4, 25))
    monkeypatch.setattr(steps, "TEACHER_SAMPLERS", ("dpmpp_2m", "euler"))
    student = tiny_checkpoint(tmp_path / "student", timestep_cond=16)
    out = tmp_path / "steps.json"
    steps.main(student, tiny, repository, n=3, out=out)
    result = json.loads(out.read_text())
    assert list(result["curves"]) == [
        "student ddim", *(f"tiny {name}" for name in steps.TEACHER_SAMPLERS),
    ]  # fmt: skip
    for curve in result["curves"].values():
        assert list(curve) == [str(count) for count in steps.STEPS]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result["summary"]
    assert Image.open(out.with_suffix(".png")).size[0] > 1000


def test_a_student_that_was_not_distilled_is_refused_before_anything_is_painted(tiny, tmp_path):
    with pytest.raises(SystemExit, match=r"--student: the UNet of .*tiny is not distilled"):
        steps.main(tiny, tiny, Path(), n=3, out=tmp_path / "steps.json")


def test_points_lost_are_paired():
    def score(right):
        return quality.Score(right, True, True, True, None, None, None, None)

    same = [score(i % 2 == 0) for i in range(100)]
    unchanged = steps.points_lost(same, same)
    assert unchanged["points"] == 0
    assert unchanged["interval"] == [-1.9, 1.9]
    worse = [score(False), *same[1:]]
    found = steps.points_lost(same, worse)
    assert found["points"] == 1
    assert found["interval"] == [-1.7, 3.7]  # by hand: 1/102 ± 1.96 √((2/102 - (1/102)²)/102)


class Words(fusion.Arm):
    """Tokens that say which word they are, and nothing else."""

    def __call__(self, texts):
        ids, mask = data.token_ids(self.tokenizer, texts)
        return torch.nn.functional.one_hot(ids, len(self.tokenizer)).float(), mask, mask


@pytest.mark.slow
def test_a_probe_tells_what_tokens_tell():
    words = Words(CHECKPOINT, "clip", torch.device("cpu"))
    said = tokens.probed(words, tokens.stream, steps=120, n=60)["all"]
    assert said["shape"] == 100  # the last word of a name is the shape
    assert said["partner_shape"] < 90
    nothing = tokens.probed(words, lambda said, *_: 0 * said, steps=120, n=60)["all"]
    assert nothing["shape"] < 50


@pytest.mark.slow
def test_the_tokens_of_every_encoder_are_probed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fusion, "MASKED_WORDS_STEPS", 2)
    out = tmp_path / "tokens.json"
    given = {"steps": 2, "n": 6, "device": "cpu", "bf16": False, "threads": 1}
    tokens.main(CHECKPOINT, tmp_path / "runs", **given, out=out)
    results = json.loads(out.read_text())["results"]
    assert list(results) == ["clip", "bert_of_masked_words", "bert", "fused"]
    for found in results.values():
        assert list(found) == [*quality.NAMES.values(), "all"]
        assert all(0 <= percent <= 100 for said in found.values() for percent in said.values())
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary == {name: found["all"] for name, found in results.items()}


def test_a_name_is_asked_for_at_its_last_word():
    encoders = fusion.Arm(CHECKPOINT, "clip", torch.device("cpu"))
    caption = ["a small red circle is left of a blue square"]
    named = Item("circle", "red", "small", 18, 32), Item("square", "blue", "large", 46, 32)
    asked = (
        tokens.last_words(tokens.answers_of(encoders, caption, [Scene(named, "black")]))[0, :, 0]
        != IGNORED
    )
    ids, _ = data.token_ids(encoders.tokenizer, caption)
    assert encoders.tokenizer.decode(ids[0, asked]).split() == ["circle", "square"]


def test_diversity_is_that_of_places_from_seed_to_seed(repository, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="--repository: its pictures have 32 pixels a side"):
        diversity.main(repository, n=2, seeds=3, out=tmp_path / "none.json")
    monkeypatch.setattr(quality, "SIDE", 32)
    monkeypatch.setattr(diversity, "read", lambda picture: read(np.tile(picture, (2, 2, 1))))
    out = tmp_path / "diversity.json"
    diversity.main(repository, n=2, seeds=3, out=out)
    summary = json.loads(out.read_text())["summary"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary
    assert summary["pictures"] == 6
    assert 10 < summary["spread_of_scenes"] < 20
    here, there = (Item("star", "red", "small", x, 30) for x in (20, 40))
    assert diversity.spread([[here, here], [there, there]]) == 0
    assert diversity.spread([[here, there], [here]]) == pytest.approx(np.sqrt(200) / 2, abs=0.01)
    assert diversity.spread([[here]]) is None
    scene = Scene((here,), "black")
    asked = [quality.Task("a red star", scene), quality.Task("a small red star", scene)]
    grown = Item("star", "red", "large", 20, 30)
    assert diversity.large(asked, [[here, grown, grown, grown], [here]]) == 75.0
    assert diversity.large(asked[1:], [[here]]) is None


def test_outlines_are_those_of_right_pictures(repository, tmp_path, monkeypatch, capsys):
    asked = quality.tasks(6)
    true = [render(task.scene) for task in asked]
    soft = [np.asarray(Image.fromarray(p).filter(ImageFilter.GaussianBlur(0.7))) for p in true]
    black = np.zeros_like(true[0])
    monkeypatch.setattr(quality, "SIDE", 32)
    found = []
    for shown in (true, soft, [*true[:3], *[black] * 3], [black] * 6):
        monkeypatch.setattr(outlines, "paint", lambda engine, prompts, shown=shown: shown)
        outlines.main(repository, n=6, out=tmp_path / "outlines.json")
        summary = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert json.loads((tmp_path / "outlines.json").read_text())["summary"] == summary
        found.append(summary)
    assert [one["right"] for one in found] == [6, 6, 3, 0]
    assert found[0]["psnr"] == found[0]["psnr_of_true"] > 50
    assert 20 < found[1]["psnr"] < 45
    assert found[2]["psnr"] > 50
    assert found[3]["psnr"] is None
