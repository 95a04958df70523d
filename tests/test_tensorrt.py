"""TensorRT plans: every exported file compiles, and a plan serves only where it was made for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import typer
from harness import ROOT, contents, export_command, skeleton

from export import pipeline
from export.checkpoint import open_checkpoint
from export.precision import Precision
from export.repository import MODELS, build, load_parts
from export.staging import put_in_place
from export.tensorrt import Limits, Range, TensorRTError, add_plans, main, wanted_by_engine
from twinbrush.engine.capacity import Capacity
from twinbrush.engine.config import ENGINE
from twinbrush.runtimes.onnx_runtime import read_config
from twinbrush.server.manifest import ManifestError, verify
from twinbrush.server.plans import PLAN, Plan, Target, check_plans, library_version

TARGETS = ("SM80", "SM89")


@pytest.fixture(scope="session")
def trt():
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for x86-64 alone")


@pytest.fixture(scope="module")
def planned(trt, repository, tmp_path_factory):
    """The tiny checkpoint with plans for GPUs that are not here."""
    folder = tmp_path_factory.mktemp("planned") / "model_repository"
    shutil.copytree(repository, folder)
    add_plans(trt, folder, TARGETS)
    return folder


@pytest.fixture(params=[Precision.FP32, pytest.param(Precision.FP16, marks=pytest.mark.slow)])
def demo(request, tmp_path):
    """The demo checkpoint; in FP32 as `make` has exported it, where it has."""
    made = ROOT / "model_repository"
    if request.param is Precision.FP32 and (made / "MANIFEST.json").is_file():
        return shutil.copytree(made, tmp_path / "model_repository")
    folder = skeleton(tmp_path / "model_repository")
    build(open_checkpoint(ROOT / "checkpoints/scenes-64"), folder, precision=request.param)
    return folder


def test_every_model_of_the_demo_checkpoint_compiles(trt, demo):
    add_plans(trt, demo, TARGETS)
    for model in MODELS:
        folder = demo / model / "1"
        weights = (folder / "model.onnx").stat().st_size
        assert (folder / PLAN).stat().st_size > weights / 2
    verify(demo)


@pytest.mark.parametrize("model", MODELS)
def test_a_plan_comes_with_its_config_log_and_record(trt, planned, model):
    plain = read_config(planned / model / "config.pbtxt")
    config = read_config(planned / model / "configs" / "tensorrt.pbtxt")
    assert (config["name"], config["backend"]) == (model, "tensorrt")
    assert (config["input"], config["output"]) == (plain["input"], plain["output"])
    folder = planned / model / "1"
    assert (folder / config["default_model_filename"]).is_file()
    assert "INFO: " in (folder / "tensorrt.log").read_text()
    assert (folder / "timing.cache").is_file()
    lines = json.loads((planned / "MANIFEST.json").read_text())["models"]
    (line,) = [line for line in lines if line["model"] == model]
    calls = [{"side": side, "rows": rows} for side, rows in ((32, 32), (64, 8), (128, 2))]
    assert line["plan"] == {"tensorrt": trt.__version__, "gpu": "SM80,SM89", "calls": calls}
    sized = model in ("unet", "vqgan_decoder")
    assert config["instance_group"][0]["profile"] == (["0", "1", "2"] if sized else ["0"])
    assert PLAN in line["sha256"]
    verify(planned)


def test_a_model_that_tensorrt_refuses_is_named_and_nothing_is_touched(trt, planned, tmp_path):
    folder = shutil.copytree(planned, tmp_path / "model_repository")
    (folder / "unet" / "1" / "model.onnx").write_bytes(b"no graph")
    before = contents(folder)
    message = r"TensorRT cannot build unet: .*[Pp]arse.*; its log ends\n\w+: "
    with pytest.raises(TensorRTError, match=message):
        add_plans(trt, folder, TARGETS)
    assert contents(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_plans_need_an_export(trt, tmp_path):
    with pytest.raises(TensorRTError, match="has no MANIFEST"):
        add_plans(trt, skeleton(tmp_path / "model_repository"))


@pytest.fixture
def unplanned(tmp_path):
    """A repository with all that plans are built from, but in files that say nothing."""
    folder = skeleton(tmp_path / "model_repository")
    for model in MODELS:
        (folder / model / "1").mkdir(exist_ok=True)
        (folder / model / "1" / "model.onnx").touch()
    write_manifest(folder, *({"model": model, "sha256": {}} for model in MODELS))
    return folder


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("MANIFEST.json", "{", "MANIFEST.json cannot be read"),
        ("MANIFEST.json", '{"models": [{}]}', "MANIFEST.json cannot be read"),
        ("unet/config.pbtxt", None, "unet/config.pbtxt is not there"),
        ("unet/1/model.onnx", None, "unet/1/model.onnx is not there"),
        (f"{ENGINE.parent}/config.pbtxt", "", "parameter max_rows of config.pbtxt is not there"),
        (f"{ENGINE}/pipeline.json", "{}", "is not a pipeline.json of this version"),
        ("text_to_image_stream/.building", "no folder", "cannot write into"),
    ],
)
def test_what_plans_cannot_be_built_from_is_one_sentence(
    unplanned, tiny, file, text, message, monkeypatch, capsys
):
    monkeypatch.setattr("export.tensorrt.load_tensorrt", lambda: None)
    opened = open_checkpoint(tiny)
    pipeline.write(opened, load_parts(opened), unplanned / ENGINE)
    if text is None:
        (unplanned / file).unlink()
    else:
        (unplanned / file).write_text(text)
    with pytest.raises(typer.Exit):
        main(unplanned)
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


def test_profiles_take_what_the_engine_sends_and_no_more_pixels_for_larger_pictures(repository):
    wanted = wanted_by_engine(repository, repository / ENGINE / "pipeline.json")
    tokens = Range(16, 16, 8 * 16)
    assert wanted.profiles("unet") == [
        Limits(rows=Range(1, 8, 32), side=Range(2, 8, 8), tokens=tokens),
        Limits(rows=Range(1, 2, 8), side=Range(2, 16, 16), tokens=tokens),
        Limits(rows=Range(1, 1, 2), side=Range(2, 32, 32), tokens=tokens),
    ]
    pictures = [limits.rows.high for limits in wanted.profiles("vqgan_decoder")]
    assert pictures == [4, 1, 1]


CALLS = Capacity(32, 32), Capacity(64, 8), Capacity(128, 2)  # of the tiny checkpoint
HERE = Target("10.14.1.48", "NVIDIA L4, 8.9")
MADE = Plan(HERE.tensorrt, HERE.gpu, CALLS)


@pytest.fixture
def served(repository, tmp_path):
    """What is read of a repository that is to serve plans; its manifest is the test's."""
    for file in (ENGINE.parent / "config.pbtxt", ENGINE / "pipeline.json"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repository / file, tmp_path / file)
    return tmp_path


def write_manifest(folder, *lines):
    (folder / "MANIFEST.json").write_text(json.dumps({"models": lines}))


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (Target("10.13.0.35", HERE.gpu), "made for TensorRT 10.14.1.48, this machine has 10.13"),
        (
            Target(HERE.tensorrt, "NVIDIA A10, 8.6"),
            "GPU NVIDIA L4, 8.9, this machine has NVIDIA A",
        ),
        (Target(HERE.tensorrt, None), "GPU NVIDIA L4, 8.9, this machine has none: run `python3 -m"),
    ],
)
def test_a_plan_of_another_tensorrt_or_gpu_is_refused(served, machine, message):
    write_manifest(served, {"model": "unet", "plan": asdict(MADE)})
    check_plans(served, HERE)
    with pytest.raises(ManifestError, match=f"the plan of unet was .*{message}"):
        check_plans(served, machine)


@pytest.mark.parametrize("calls", [(), CALLS[:1]])
def test_a_plan_for_other_calls_than_the_engines_is_refused(served, calls):
    write_manifest(served, {"model": "unet", "plan": asdict(replace(MADE, calls=calls))})
    takes = "32 rows to 32 pixels" if calls else "nothing"
    message = f"plan of unet takes {takes}, the engine asks for 32 rows .* 2 rows to 128 pixels, by"
    with pytest.raises(ManifestError, match=message):
        check_plans(served, HERE)


def test_a_changed_max_rows_needs_new_plans(served):
    write_manifest(served, {"model": "unet", "plan": asdict(MADE)})
    config = served / ENGINE.parent / "config.pbtxt"
    config.write_text(config.read_text().replace('"32"', '"64"'))
    with pytest.raises(ManifestError, match=r"the engine asks for 64 rows to 32 pixels, 16 rows"):
        check_plans(served, HERE)
    own = served / ENGINE.parent / "configs" / "tensorrt.pbtxt"
    own.parent.mkdir()
    own.write_text(config.read_text().replace('"64"', '"32"'))
    check_plans(served, HERE)
    own.unlink()
    config.unlink()
    with pytest.raises(ManifestError, match=r"No such file.*config\.pbtxt"):
        check_plans(served, HERE)


def test_models_without_a_plan_are_named(tmp_path):
    lines = [{"model": "bert"}, {"model": "unet", "plan": asdict(MADE)}, {"model": "fusion"}]
    write_manifest(tmp_path, *lines)
    with pytest.raises(ManifestError, match=r"no TensorRT plan of bert, fusion: run `python3 -m"):
        check_plans(tmp_path, HERE)


@pytest.mark.parametrize("text", ["{", "[]", '{"models": [{"plan": {"tensorrt": "10"}}]}'])
def test_a_manifest_whose_plans_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / "MANIFEST.json").write_text(text)
    with pytest.raises(ManifestError, match=r"MANIFEST\.json cannot be read"):
        check_plans(tmp_path, HERE)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("planned", "the plan of clip_text was made for TensorRT 1.7.1.116, this machine has"),
        ("repository", "no TensorRT plan of clip_text, bert, fusion, unet, vqgan_decoder: run"),
    ],
)
def test_the_server_says_what_to_run_instead_of_serving(kind, message, request, start_server):
    server = start_server(request.getfixturevalue(kind), "--config-name", "tensorrt")
    assert server.process.wait(60) == 1
    assert message in server.text()
    assert len(server.text().strip().splitlines()) == 1


def test_the_library_tells_the_version_that_plans_record(trt):
    import tensorrt_rtx_libs

    (library,) = Path(tensorrt_rtx_libs.__file__).parent.glob("libtensorrt_rtx.so*")
    assert library_version(str(library)) == trt.__version__
    assert library_version("libno_such_tensorrt.so") is None
    assert library_version(None) is None


def export_with_plans(repository: Path) -> tuple[int, str]:
    """`python -m export --tensorrt`: its exit code and all that it prints."""
    source = ROOT / "checkpoints" / "scenes-64"
    done = export_command(source, "--tensorrt", "--repository", repository)
    return done.exit_code, done.output


def build_plans(repository: Path) -> tuple[int, str]:
    """`python -m export.tensorrt`, in a process: its exit code and all that it prints."""
    command = [sys.executable, "-m", "export.tensorrt", "--repository", str(repository)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("command", [export_with_plans, build_plans])
def test_without_tensorrt_the_command_says_where_to_run_it(command, repository):
    before = contents(repository)
    code, said = command(repository)
    assert code == 1
    said = said.strip()
    assert "plans need TensorRT's Python package" in said
    assert "build them in NVIDIA's Triton container, with `pip install tensorrt==VER" in said
    assert len(said.splitlines()) == 1
    assert contents(repository) == before


def test_plans_are_built_without_the_exporters_packages():
    heavy = "torch", "transformers", "diffusers", "onnx", "onnxruntime"
    code = f"import sys, export.tensorrt; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_new_model_sweeps_what_was_made_with_the_old_one_and_nothing_else(tmp_path):
    stage, repository = tmp_path / "stage", tmp_path / "model_repository"
    made = ("1/model.onnx", "1/model.onnx.data", f"1/{PLAN}", "configs/tensorrt.pbtxt")
    for file in [f"{model}/{name}" for model in ("unet", "bert") for name in made]:
        (repository / file).parent.mkdir(parents=True, exist_ok=True)
        (repository / file).write_text("old")
    new = stage / "unet" / "1" / "model.onnx"
    new.parent.mkdir(parents=True)
    new.write_text("new")
    put_in_place(stage, repository)
    assert set(contents(repository)) == {"unet/1/model.onnx", *(f"bert/{name}" for name in made)}
    assert (repository / "unet/1/model.onnx").read_text() == "new"
