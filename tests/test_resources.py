"""What an export needs is asked before it starts; checkpoints here only say that they are large."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import contents, export_command
from safetensors.torch import load_file

from export.resources import free_memory, weight_count


@pytest.fixture
def huge(tiny, tmp_path):
    """A copy of the tiny checkpoint whose UNet claims 10¹³ weights."""
    folder = shutil.copytree(tiny, tmp_path / "huge")
    (weights,) = (folder / "unet").glob("*.safetensors")
    tensor = {"dtype": "F32", "shape": [10**7, 10**6], "data_offsets": [0, 4 * 10**13]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "conv_in.weight": tensor}).encode()
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "not enough disk at {repository}: the export needs about 40000."),
        (["--precision", "fp16"], "not enough disk at {repository}: the export needs about 20000."),
        (["--only", "clip_text"], "not enough memory: the export needs about 4000"),
    ],
)
def test_a_machine_that_is_too_small_is_told_so_at_once(huge, repository, flags, message):
    before = contents(repository)
    done = export_command(huge, "--repository", repository, *flags)
    assert done.exit_code == 1
    assert message.format(repository=repository) in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1
    assert contents(repository) == before


def test_weights_are_counted_without_reading_them(tiny):
    (file,) = (tiny / "unet").glob("*.safetensors")
    assert weight_count(tiny / "unet") == sum(t.numel() for t in load_file(file).values())


def test_free_memory_is_some_and_not_more_than_there_is():
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < free_memory() <= total
