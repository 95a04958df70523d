"""What may import what."""

import subprocess
import sys
from pathlib import Path

import pytest

from twinbrush.engine.field_tables import COPIES, replaced
from twinbrush.engine.request import COMMANDS, FIELDS
from twinbrush.runtimes.onnx_runtime import read_config
from twinbrush_client.fields import DATA_TYPES

ROOT = Path(__file__).parent.parent


def test_rooms_import_downwards_only():
    checked = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_only_the_triton_room_names_pb_utils():
    # Benchmarks serve models of their own beside the product's.
    folders = ("twinbrush", "networks", "export", "training", "client", "gateway", "examples",
               "model_repository")  # fmt: skip
    naming = {
        path.relative_to(ROOT).parent
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if "pb_utils" in path.read_text()
    }
    assert naming == {Path("twinbrush/triton")}


def test_the_triton_room_knows_nothing_of_diffusion():
    for path in (ROOT / "twinbrush" / "triton").glob("*.py"):
        text = path.read_text().lower()
        for word in ("unet", "latent", "timestep", "sigma", "vqgan", "clip_text", "hidden_states"):
            assert word not in text, (path.name, word)


def test_the_front_doors_and_the_client_take_the_fields_of_a_request():
    def taken(model):
        config = read_config(ROOT / "model_repository" / model / "config.pbtxt")
        return {t["name"]: t["data_type"].removeprefix("TYPE_") for t in config["input"]}

    wire = {name: kind.replace("BYTES", "STRING") for name, kind in DATA_TYPES.items()}
    assert set(wire) == set(FIELDS)
    commands = {name: field.data_type for name, field in COMMANDS.items()}
    assert commands == {"cancel": "STRING", "info": "BOOL"}
    assert taken("text_to_image_stream") == wire | commands
    del wire["progress"], wire["preview_every"]
    assert taken("text_to_image") == wire


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_the_request_table_are_up_to_date(name):
    """If not: `python -m twinbrush.engine.field_tables`."""
    text = (ROOT / name).read_text()
    assert COPIES[name](text) == text


def test_a_copy_without_its_marks_is_no_copy():
    with pytest.raises(ValueError, match="no text between"):
        replaced("a\nb\n", ("a\n", "c\n"), "text")


def test_nothing_reads_pickles_or_remote_code():
    words = ("import pickle", "torch.load(", "trust_remote_code=True", "allow_pickle=True")
    paths = {*ROOT.glob("[!.]*/**/*.py")} - {Path(__file__)}
    assert {path.parts[len(ROOT.parts)] for path in paths} >= {"twinbrush", "export", "training"}
    found = [(path, word) for path in paths for word in words if word in path.read_text()]
    assert found == []
