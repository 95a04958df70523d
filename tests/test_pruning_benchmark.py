"""The curves of quality and speed against the pruning ratio."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from harness import ROOT
from PIL import Image

from benchmarks import pruning
from benchmarks.pruning import Bench, Psnr, Result, plot
from examples.scenes.benchmarks import pruning as on_scenes
from examples.scenes.benchmarks.pruning import AllCorrect

CHECKPOINT = ROOT / "checkpoints" / "scenes-64"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "fusion"}, "--model 'fusion' is not one of clip_text, bert, unet"),
        ({"ratios": "0.3,1"}, "--ratios '0.3,1': shares over 0 and under 1"),
        ({"ratios": "some"}, "--ratios 'some': shares over 0 and under 1"),
        ({"repository": Path("nothing")}, "--repository nothing serves nothing, not scenes-64"),
    ],
)
def test_options_that_are_not_allowed_are_named(repository, options, message):
    given = {"repository": repository, "model": "unet", "ratios": "0.3"} | options
    with pytest.raises(ValueError, match=message):
        pruning._check(CHECKPOINT, **given)


def test_a_repository_of_another_checkpoint_is_refused(repository):
    with pytest.raises(ValueError, match="serves tiny, not scenes-64"):
        pruning._check(CHECKPOINT, repository, "unet", "0.3")


def test_step_times_are_of_every_model_and_batch(tiny, repository, tmp_path):
    bench = Bench(tiny, repository, "bert", tmp_path, Psnr(1))
    file = repository / "bert" / "1" / "model.onnx"
    bench._files = [file, file]
    medians = bench.step_times(turns=3)
    assert [set(one) for one in medians] == [{1, 16}] * 2
    assert all(ms > 0 for one in medians for ms in one.values())


def test_what_is_measured_is_kept_when_the_rest_fails(tiny, repository, tmp_path, monkeypatch):
    out, cell = tmp_path / "x.json", {"percent": 90.0, "interval": [85.0, 93.0], "n": 1}
    monkeypatch.setattr(Bench, "_paint", lambda bench, file: [])
    monkeypatch.setattr(AllCorrect, "score", lambda measure, pictures: cell)
    monkeypatch.setattr(Bench, "step_times", lambda bench, turns: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        on_scenes.main(
            tiny, repository, "bert", "0.99,0.2", recovery=0, batch=1, bf16=False,
            runs=tmp_path, n=1, turns=1, out=out,
        )  # fmt: skip
    result = json.loads(out.read_text())
    assert [point["ratio"] for point in result["points"]] == [0, 0.2]
    (unreachable,) = result["unreachable"]
    assert unreachable["ratio"] == 0.99
    assert "at most" in unreachable["reason"]


def test_bytes_are_those_of_external_data_too(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"12")
    (tmp_path / "model.onnx.data").write_bytes(b"345")
    assert pruning._size(tmp_path / "model.onnx") == 5


def test_the_plot_is_drawn_with_and_without_recovery(tmp_path):
    cell = {"percent": 90.0, "interval": [85.0, 93.0], "n": 100}
    points = [
        {
            "ratio": removed / 100, "macs_removed": removed, "speedup": {1: 1.0, 16: 1.1},
            "pruned": cell, "recovered": after,
        }
        for removed, after in ((30, None), (0, cell))
    ]  # fmt: skip
    plot(points, "unet", tmp_path / "x.png", AllCorrect(1))
    assert Image.open(tmp_path / "x.png").size == (1200, 480)


@pytest.mark.parametrize("name", ["pruning", "pruning_bert"])
def test_committed_results_can_be_plotted(name, tmp_path):
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    plot(result["points"], result["model"], tmp_path / "x.png", AllCorrect(1))
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_psnr_is_against_the_unpruned_model():
    measure, black = Psnr(3), np.zeros((3, 8, 8, 3), np.uint8)
    measure.start([*black])
    assert len(measure.prompts) == 3
    assert measure.score([*black]) == {"psnr": 100.0, "n": 3}
    assert measure.score([black[0], black[1], black[2] + 255]) == {"psnr": 4.77, "n": 3}


def test_a_result_has_speeds_against_the_unpruned_model(tmp_path, capsys):
    result = Result(tmp_path / "x.json", "command", "tiny", "unet", Psnr(2), (0, 8))
    for ratio, psnr in ((0, 100.0), (0.3, 20.0)):
        cell = {"psnr": psnr, "n": 2}
        point = {"ratio": ratio, "macs_removed": 100 * ratio, "pruned": cell, "recovered": None}
        result.points.append(point)
    result.finish([{1: 10.0, 16: 90.0}, {1: 8.0, 16: 60.0}])
    saved = json.loads((tmp_path / "x.json").read_text())
    assert saved["points"][1]["speedup"] == {"1": 1.25, "16": 1.5}
    assert saved["recovery"] == {"steps": 0, "batch": 8}
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["0.3"]["psnr"] == [20.0, None]
    assert (tmp_path / "x.png").exists()


def test_recovery_needs_data(tiny, repository, tmp_path):
    with pytest.raises(SystemExit, match="error: --recovery needs --data: captioned pictures"):
        pruning.main(tiny, repository, "unet", "0.3", recovery=1, out=tmp_path / "x.json")
