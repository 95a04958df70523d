"""The benchmarks of what the project claims, run in full on few steps and prompts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import fusion, quality, steps
from benchmarks.reader import read
from checkpoints import tiny_checkpoint
from training import diffusion

CHECKPOINT = Path("checkpoints/scenes-64")


def test_every_arm_of_fusion_is_trained_and_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(diffusion, "SCENES", 100)
    out = tmp_path / "fusion.json"
    torch.set_num_threads(1)
    fusion.main(
        CHECKPOINT, tmp_path / "runs", steps=2, batch=4, seeds=2, device="cpu", bf16=False, n=3,
        out=out,
    )  # fmt: skip
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result["summary"]
    assert list(result["results"]) == list(fusion.ARMS)
    for tables in result["results"].values():
        assert [table["all"]["all_correct"]["n"] for table in tables] == [3, 3]
    assert Image.open(out.with_suffix(".png")).size[0] > 500


def test_steps_are_measured_of_student_and_teacher(repository, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "read", lambda picture: read(np.tile(picture, (2, 2, 1))))
    student = tiny_checkpoint(tmp_path / "tiny", timestep_cond=16)
    teacher = tiny_checkpoint(tmp_path / "tiny-teacher")
    out = tmp_path / "steps.json"
    steps.main(student, teacher, repository, n=3, out=out)
    result = json.loads(out.read_text())
    assert list(result["curves"]) == [
        "tiny lcm", *(f"tiny-teacher {name}" for name in steps.TEACHER_SAMPLERS),
    ]  # fmt: skip
    for curve in result["curves"].values():
        assert list(curve) == [str(count) for count in steps.STEPS]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result["summary"]
    assert Image.open(out.with_suffix(".png")).size[0] > 1000
