"""What result files say of the machine."""

from __future__ import annotations

import json
import sys

from benchmarks.machine import describe, write_result


def test_a_result_names_the_gpu_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe()["gpu"] is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA L4, 8.9'\necho 'NVIDIA T4, 7.5'\n")
    tool.chmod(0o755)
    assert describe()["gpu"] == "NVIDIA L4, 8.9"


def test_the_command_of_a_result_names_no_path(tmp_path, monkeypatch):
    options = ["--turns", "5", "--out", "there", "--folder=here", "--sides", "48,64"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *options])
    write_result(tmp_path / "made" / "result.json", "python -m benchmark", figure=1)
    result = json.loads((tmp_path / "made" / "result.json").read_text())
    assert result["command"] == "python -m benchmark --turns 5 --sides 48,64"
    assert (result["figure"], result["machine"]) == (1, describe())
