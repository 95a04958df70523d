"""What result files say of the machine."""

from __future__ import annotations

from benchmarks.machine import describe


def test_a_result_names_the_gpu_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe()["gpu"] is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA L4, 8.9'\necho 'NVIDIA T4, 7.5'\n")
    tool.chmod(0o755)
    assert describe()["gpu"] == "NVIDIA L4, 8.9"
