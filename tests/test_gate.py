"""The gate: what passes, what is refused, and who is blamed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from harness import contents, export_command, skeleton

from examples.scenes.gate import AllCorrect, all_correct
from examples.scenes.quality import tasks
from examples.scenes.scenes import render
from export import pipeline
from export.checkpoint import open_checkpoint
from export.convert import to_onnx
from export.gate import PROMPTS, Gate, GateError, Psnr, psnr
from export.prune import prune_checkpoint, save_part
from export.repository import SOURCE, build, load_parts
from export.staging import STAGE
from networks.pruned import pruning_of
from twinbrush.engine.config import ENGINE
from twinbrush.runtimes.onnx_runtime import LocalModels

PSNR = 15.0


@pytest.fixture(scope="module")
def good(tiny, tmp_path_factory) -> Path:
    """The tiny checkpoint with a narrower decoder that paints nearly the same."""
    folder = tmp_path_factory.mktemp("good") / "good"
    prune_checkpoint(open_checkpoint(tiny), {"vqgan_decoder": 0.02}, folder)
    return folder


@pytest.fixture
def bad(good, tmp_path) -> Path:
    """The same, painting negatives."""
    opened = open_checkpoint(shutil.copytree(good, tmp_path / "bad"))
    part = load_parts(opened)["vqgan_decoder"]
    with torch.no_grad():
        part.module.vae.decoder.conv_out.weight.mul_(-1)
    place = opened.folders[SOURCE["vqgan_decoder"]]
    save_part(opened, part, pruning_of(place), place)
    return tmp_path / "bad"


@pytest.fixture
def served(repository, tmp_path) -> Path:
    """A copy of the exported repository, to export into."""
    return Path(shutil.copytree(repository, tmp_path / "model_repository"))


def export(checkpoint: Path, tiny: Path, served: Path) -> list:
    gate = Gate(open_checkpoint(tiny), ["vqgan_decoder"], served, psnr(PSNR))
    return build(open_checkpoint(checkpoint), served, only=["vqgan_decoder"], check=gate)


def test_a_good_repository_passes_and_the_manifest_says_so(good, tiny, served):
    export(good, tiny, served)
    manifest = json.loads((served / "MANIFEST.json").read_text())
    verdict = manifest["gate"]
    assert verdict["measure"] == "psnr"
    assert PSNR < verdict["after"] < verdict["before"]
    assert manifest["models"][-1]["pruning"]["ratio"] == 0.02


def test_a_bad_repository_is_refused_and_the_old_one_untouched(bad, tiny, served):
    before = contents(served)
    with pytest.raises(GateError, match=r"dB .* on 8 prompts, --gate-psnr is 15; alone: vqgan"):
        export(bad, tiny, served)
    assert contents(served) == before
    assert not (served / STAGE).parent.exists()


def test_a_first_export_needs_no_repository_before_it(
    tiny, good, repository, tmp_path, monkeypatch
):
    def exported(part, file, precision):
        """What is not pruned is in the exported repository already."""
        if part.name == "vqgan_decoder":
            return to_onnx(part, file, precision)
        shutil.copy(repository / part.name / "1" / "model.onnx", file)
        return 2, 1

    monkeypatch.setattr("export.repository.to_onnx", exported)
    folder = skeleton(tmp_path / "fresh")
    gate = Gate(open_checkpoint(tiny), ["vqgan_decoder"], folder, psnr(PSNR, 2))
    build(open_checkpoint(good), folder, check=gate)
    assert json.loads((folder / "MANIFEST.json").read_text())["gate"]["prompts"] == 2


def test_large_pictures_are_painted_one_at_a_time(tiny, served, monkeypatch):
    rows = []

    class Watched(LocalModels):
        def run(self, model, inputs):
            if model == "unet":
                rows.append(len(inputs["sample"]))
            return super().run(model, inputs)

    monkeypatch.setattr("export.gate.LocalModels", Watched)
    gate = Gate(open_checkpoint(tiny), [], served, psnr())
    for side, most in ((16, 2), (32, 32)):
        monkeypatch.setattr("export.gate.SHARED_SIDE", side)
        rows.clear()
        assert len(gate._paint(served, {}, {}, list(PROMPTS[:4]))) == 4
        assert (max(rows) <= 2) == (most == 2)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_pruned_checkpoint_is_not_its_own_measure(good, tmp_path, precision):
    folder = skeleton(tmp_path / "model_repository")
    done = export_command(good, "--repository", folder, "--precision", precision, "--gate")
    assert done.exit_code == 1
    assert "--gate needs --gate-against" in done.stdout
    assert "good has vqgan_decoder pruned" in done.stdout


def test_pruning_saving_and_gating_is_one_command(tiny, served, tmp_path):
    done = export_command(
        tiny, "--repository", served, "--only", "unet", "--prune", "unet=0.3",
        "--save-pruned", tmp_path / "saved", "--gate", "--gate-psnr", "1", "--gate-prompts", "2",
    )  # fmt: skip
    assert done.exit_code == 0, done.stdout
    verdict = json.loads((served / "MANIFEST.json").read_text())["gate"]
    said = f"pictures are {verdict['after']:.1f} dB from the unoptimised on 2 prompts"
    assert f"the gate passes: {said}, --gate-psnr is 1" in done.stdout
    assert pruning_of(tmp_path / "saved" / "unet").ratio == 0.3
    assert not list(served.rglob(".building"))


class SceneGate(Gate):
    """A gate whose models paint true scenes, but for as many pictures as each model spoils."""

    spoils: ClassVar = {"unet": 0, "bert": 0}

    def _export_plain(self, folder):
        return {name: folder / f"{name}.onnx" for name in self._optimised}

    def _plain_configs(self, configs, folder):
        return configs

    def _paint(self, stage, files, configs, prompts):
        spoilt = sum(n for name, n in self.spoils.items() if files[name].is_relative_to(stage))
        blank = np.zeros((64, 64, 3), np.uint8)
        return [
            blank if k < spoilt else render(task.scene)
            for k, task in enumerate(tasks(len(prompts)))
        ]


@pytest.fixture
def scene_gate(tiny, tmp_path) -> tuple[SceneGate, Path]:
    """A gate on 20 prompts that allows 5 points, and a stage of 64-pixel pictures."""
    stage, opened = tmp_path / "stage", open_checkpoint(tiny)
    for name in SceneGate.spoils:
        (stage / name / "1").mkdir(parents=True)
        (stage / name / "1" / "model.onnx").touch()
    (stage / ENGINE).mkdir(parents=True)
    pipeline.write(opened, load_parts(opened), stage / ENGINE)
    file = stage / ENGINE / "pipeline.json"
    sides = {"native_width": 64, "native_height": 64}
    file.write_text(json.dumps(json.loads(file.read_text()) | sides))
    measure = all_correct(loss=5, prompts=20)
    return SceneGate(opened, [*SceneGate.spoils], tmp_path / "repository", measure), stage


def test_scenes_that_can_be_read_are_counted(scene_gate, monkeypatch):
    gate, stage = scene_gate
    monkeypatch.setattr(SceneGate, "spoils", {"unet": 1, "bert": 0})
    verdict = gate(stage)
    assert verdict["measure"] == "all correct"
    assert (verdict["before"], verdict["after"], verdict["prompts"]) == (100, 95, 20)


def test_the_refusal_says_which_model_cost_what(scene_gate, monkeypatch):
    gate, stage = scene_gate
    monkeypatch.setattr(SceneGate, "spoils", {"unet": 2, "bert": 1})
    message = (
        r"all-correct went from 100.0% to 85.0% on 20 prompts, --gate-loss is 5 points;"
        r" alone: unet 10.0 points, bert 5.0 points"
    )
    with pytest.raises(GateError, match=message):
        gate(stage)


def test_pictures_that_cannot_be_read_are_compared(scene_gate, monkeypatch):
    gate, stage = scene_gate
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    monkeypatch.setattr(SceneGate, "_paint", lambda *given: [noise] * len(given[-1]))
    assert gate(stage)["measure"] == "psnr"


def test_models_that_cannot_paint_are_refused_in_one_sentence(scene_gate, tmp_path):
    gate, stage = scene_gate
    skeleton(tmp_path / "repository")
    empty = {"unet": stage / "unet" / "1" / "model.onnx"}
    with pytest.raises(GateError, match="the gate cannot paint: ONNX Runtime cannot load"):
        Gate._paint(gate, stage, empty, {}, ["a red circle"])


def test_psnr_is_what_its_formula_says():
    measure = Psnr(prompts=1)
    measure.set_before([np.full((4, 4, 3), 100, np.uint8)])
    assert measure.score([np.full((4, 4, 3), 110, np.uint8)]) == pytest.approx(28.13, abs=0.01)
    assert measure.score([np.full((4, 4, 3), 100, np.uint8)]) == measure.before


def test_equal_pictures_do_not_hide_one_that_is_black():
    measure = Psnr(prompts=4)
    wanted = [np.full((4, 4, 3), 100, np.uint8)] * 4
    measure.set_before(wanted)
    black = np.zeros((4, 4, 3), np.uint8)
    alone = 20 * np.log10(255 / 100)
    assert measure.score([*wanted[:3], black]) == pytest.approx(alone + 10 * np.log10(4))


def test_a_loss_up_to_the_limit_is_allowed():
    measure = AllCorrect(loss=50, prompts=2)
    true = [render(task.scene) for task in tasks(2)]
    measure.set_before(true)
    assert measure.allowed == 50
    assert measure.score([true[0], true[0]]) == 50
