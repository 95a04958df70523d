"""What an export needs is asked before it starts; checkpoints here only say that they are large."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from harness import contents, export_command
from safetensors.torch import load_file

from export import resources
from export.checkpoint import open_checkpoint
from export.precision import Precision
from export.prune import prune_checkpoint
from export.resources import ResourceError, check_resources, free_memory, weight_count

SIZE = 4 * 10**12  # bytes


@pytest.fixture
def huge(tiny, tmp_path):
    """A copy of the tiny checkpoint whose UNet has 10¹² weights more; they take no room."""
    folder = shutil.copytree(tiny, tmp_path / "huge")
    (weights,) = (folder / "unet").glob("*.safetensors")
    whole = weights.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    end = len(whole) - start
    tensor = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [end, end + SIZE]}
    header = json.dumps(json.loads(whole[8:start]) | {"huge.weight": tensor}).encode()
    with weights.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header + whole[start:])
        file.truncate(8 + len(header) + end + SIZE)  # sparse
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "not enough disk at {repository}: the export needs about 4000."),
        (["--precision", "fp16"], "not enough disk at {repository}: the export needs about 2000."),
        (["--prune", "clip_text=0.25"], "not enough disk at {repository}: the export needs"),
    ],
)
def test_a_machine_that_is_too_small_is_told_so_at_once(
    huge, repository, flags, message, monkeypatch
):
    monkeypatch.setattr("export.command.prune_checkpoint", lambda *_: pytest.fail("it pruned"))
    before = contents(repository)
    done = export_command(huge, "--repository", repository, *flags)
    assert done.exit_code == 1
    assert message.format(repository=repository) in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1
    assert contents(repository) == before


def test_the_largest_part_decides_on_the_memory_and_those_that_stay_need_none(
    huge, tmp_path, monkeypatch
):
    monkeypatch.setattr(resources, "check_disk", lambda *_: None)
    unet, text = huge / "unet", huge / "text_encoder"
    check_resources([text], tmp_path, Precision.FP16)
    check_resources([text], tmp_path, Precision.FP32, together=[text])
    for built, together in (([text, unet], []), ([text], [unet])):
        with pytest.raises(ResourceError, match=r"not enough memory: .* about 4601\.5 GB"):
            check_resources(built, tmp_path, Precision.FP16, together)


def test_a_disk_without_room_for_the_pruned_checkpoint_is_told_at_once(huge, tmp_path):
    folder = tmp_path / "there"
    folder.mkdir()
    with pytest.raises(ResourceError, match=f"not enough disk at {folder}: .* about 4000"):
        prune_checkpoint(open_checkpoint(huge), {"clip_text": 0.25}, folder / "pruned")
    assert not list(folder.iterdir())


def test_weights_are_counted_without_reading_them(tiny):
    (file,) = (tiny / "unet").glob("*.safetensors")
    assert weight_count(tiny / "unet") == sum(t.numel() for t in load_file(file).values())


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_copies_of_the_weights_that_are_not_read_do_not_count(tiny, tmp_path, variant):
    folder = shutil.copytree(tiny / "unet", tmp_path / "unet")
    (file,) = folder.glob("*.safetensors")
    shutil.copy(file, file.with_suffix(f".{variant}.safetensors"))
    assert weight_count(folder) == weight_count(tiny / "unet")


def test_files_that_the_system_can_drop_from_memory_are_free(tmp_path, monkeypatch):
    for name, text in {
        "memory.max": "9000\n",
        "memory.current": "5000\n",
        "memory.stat": "anon 1000\nfile 4000\ninactive_file 3000\nactive_file 1000\n",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(resources, "CGROUP", tmp_path)
    assert free_memory() == 7000


def test_free_memory_is_some_and_not_more_than_there_is():
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < free_memory() <= total
