"""What may import what."""

import ast
import subprocess
import sys
from pathlib import Path

from twinbrush.onnx_runtime import read_config
from twinbrush.request import FIELDS
from twinbrush_client.wire import DATA_TYPES

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "diffusers", "transformers", "onnxruntime", "tritonclient", "pytriton",
         "triton_python_backend_utils")  # fmt: skip
ENGINE = (
    "batcher", "cancel_watch", "capacity", "conditioning", "config", "denoise", "engine",
    "generation", "images", "manifest", "prompt", "relay", "request", "samplers", "server",
    "tensorrt", "triton_install", "triton_process",
)  # fmt: skip


def test_the_engine_and_the_launcher_pull_in_neither_torch_nor_triton():
    code = (
        "import importlib, sys\n"
        f"for name in {ENGINE}: importlib.import_module('twinbrush.' + name)\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"


def test_every_module_is_either_light_or_an_adapter():
    modules = {path.stem for path in (ROOT / "twinbrush").glob("*.py")}
    assert modules == {*ENGINE, "__init__", "triton_io", "onnx_runtime"}


def test_only_triton_io_and_the_models_name_pb_utils():
    folders = ("twinbrush", "export", "training", "client", "benchmarks", "model_repository")
    naming = {
        path.relative_to(ROOT)
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if "pb_utils" in path.read_text()
    }
    assert naming == {Path("twinbrush/triton_io.py")}


def test_triton_io_knows_nothing_of_diffusion():
    text = (ROOT / "twinbrush" / "triton_io.py").read_text().lower()
    for word in ("unet", "latent", "timestep", "sigma", "vqgan", "clip_text", "hidden_states"):
        assert word not in text, word


def test_the_front_doors_and_the_client_take_the_fields_of_a_request():
    def taken(model):
        config = read_config(ROOT / "model_repository" / model / "config.pbtxt")
        return {t["name"]: t["data_type"].removeprefix("TYPE_") for t in config["input"]}

    wire = {name: kind.replace("BYTES", "STRING") for name, kind in DATA_TYPES.items()}
    assert set(wire) == set(FIELDS)
    assert taken("text_to_image_stream") == wire | {"cancel": "STRING"}
    del wire["progress"], wire["preview_every"]
    assert taken("text_to_image") == wire


def test_the_engine_knows_nothing_of_triton():
    for name in ("batcher", "denoise", "samplers", "request", "prompt", "relay", "images"):
        tree = ast.walk(ast.parse((ROOT / "twinbrush" / f"{name}.py").read_text()))
        imports = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not any("triton" in ast.unparse(node) for node in imports), name


def test_nothing_reads_pickles_or_remote_code():
    words = ("import pickle", "torch.load(", "trust_remote_code=True", "allow_pickle=True")
    paths = {*ROOT.glob("[!.]*/**/*.py")} - {Path(__file__)}
    assert {path.parts[len(ROOT.parts)] for path in paths} >= {"twinbrush", "export", "training"}
    found = [(path, word) for path in paths for word in words if word in path.read_text()]
    assert found == []
