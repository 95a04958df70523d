"""The CPU's runtime: chosen by measurement, written into config.pbtxt, honoured by sessions."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from harness import export_command, open_engine, skeleton

from export.cpu_runtime import (
    Choice,
    CpuRuntime,
    CpuRuntimeError,
    _choice,
    output_error,
    with_accelerator,
    without_accelerator,
)
from export.painting import paint
from twinbrush.runtimes.onnx_runtime import open_session, read_config
from twinbrush.runtimes.openvino_runtime import OpenVinoSession, parse_parameters

TIMES = {"onnxruntime": 10.0, "openvino fp32": 11.0, "openvino bf16": 5.0}


def test_auto_takes_the_fastest_within_its_tolerance():
    assert _choice(TIMES, {}, CpuRuntime.AUTO).precision == "bf16"
    refused = {"openvino bf16": "its error 1.0e-01 is over 5e-02"}
    choice = _choice(TIMES, refused, CpuRuntime.AUTO)
    assert (choice.runtime, choice.precision) == ("onnxruntime", "fp32")
    assert "not openvino bf16: its error 1.0e-01" in choice.describe("unet")


def test_a_small_gain_is_no_reason_to_change():
    times = {"onnxruntime": 10.0, "openvino fp32": 9.8}
    assert _choice(times, {}, CpuRuntime.AUTO).runtime == "onnxruntime"
    assert _choice(times, {}, CpuRuntime.OPENVINO).runtime == "openvino"


def test_a_wanted_runtime_that_fails_is_an_error_with_the_reasons():
    refused = {"openvino fp32": "no file", "openvino bf16": "its error is large"}
    with pytest.raises(CpuRuntimeError, match="openvino fp32: no file; openvino bf16: its error"):
        _choice(TIMES, refused, CpuRuntime.OPENVINO)


def test_the_choice_is_written_once_and_can_be_taken_back(repository, tmp_path):
    config = (repository / "unet" / "config.pbtxt").read_text()
    written = with_accelerator(with_accelerator(config, "fp32"), "bf16")
    file = tmp_path / "config.pbtxt"
    file.write_text(written)
    accelerators = read_config(file)["optimization"]["execution_accelerators"]
    expected = {"name": "openvino", "parameters": {"precision": "bf16"}}
    assert accelerators == {"cpu_execution_accelerator": [expected]}
    assert without_accelerator(written) == config


def test_an_optimization_of_the_owner_stays(repository):
    config = (repository / "unet" / "config.pbtxt").read_text()
    with pytest.raises(CpuRuntimeError, match="optimization of its own"):
        with_accelerator("optimization { graph { level: 1 } }\n" + config, "bf16")


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"precision": "int4"}, "precision='int4' is invalid: must be fp32, fp16, bf16"),
        ({"num_of_threads": "0"}, "num_of_threads='0' is invalid: must be a whole number above 0"),
        ({"device": "GPU"}, "device is no parameter of openvino"),
    ],
)
def test_parameters_of_the_accelerator_are_checked(parameters, text):
    with pytest.raises(ValueError, match=text):
        parse_parameters(parameters, 2)


def test_openvino_answers_like_onnx_runtime(repository):
    pytest.importorskip("openvino")
    file = repository / "unet" / "1" / "model.onnx"
    config = read_config(repository / "unet" / "config.pbtxt")
    plain = open_session(file, config)
    chance = np.random.default_rng(0)
    feed = {}
    for node in plain.get_inputs():
        fixed = [size if isinstance(size, int) else 8 for size in node.shape[1:]]
        feed[node.name] = chance.standard_normal([2, *fixed]).astype(np.float32)
    feed["timestep"] = np.array([999, 259], np.float32)
    (wanted,) = plain.run(None, feed)
    for precision, tolerance in (("fp32", 1e-3), ("bf16", 5e-2)):
        entry = {"name": "openvino", "parameters": {"precision": precision}}
        accelerators = {"execution_accelerators": {"cpu_execution_accelerator": [entry]}}
        session = open_session(file, config | {"optimization": accelerators})
        assert isinstance(session, OpenVinoSession)
        for ours, theirs in zip(session.get_inputs(), plain.get_inputs(), strict=True):
            fixed = [size if isinstance(size, int) else None for size in theirs.shape]
            assert (ours.name, ours.shape, ours.type) == (theirs.name, fixed, theirs.type)
        (got,) = session.run(["model_output"], feed)
        # A timestep that BF16 rounds before its sine changes the output by far more than this.
        assert np.abs(got - wanted).max() <= tolerance * np.abs(wanted).max(), precision


def test_signals_reach_a_process_whose_sessions_are_gone(repository):
    pytest.importorskip("openvino")
    file = repository / "vqgan_decoder" / "1" / "model.onnx"
    program = f"""if True:
        import os, pathlib, signal
        from twinbrush.runtimes.openvino_runtime import OpenVinoSession
        first, second = (OpenVinoSession(pathlib.Path({str(file)!r}), {{}}, 1) for _ in range(2))
        del first, second
        signal.signal(signal.SIGUSR1, lambda *_: print("heard"))
        os.kill(os.getpid(), signal.SIGUSR1)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


def test_an_export_for_openvino_says_what_it_measured_and_paints(tiny, tmp_path):
    pytest.importorskip("openvino")
    folder, report = skeleton(tmp_path / "model_repository"), tmp_path / "report.json"
    done = export_command(
        tiny, "--repository", folder, "--cpu-runtime", "openvino", "--report", report
    )
    assert done.exit_code == 0, done.output
    assert "unet runs on openvino" in done.output
    lines = {line["model"]: line["cpu_runtime"] for line in json.loads(report.read_text())}
    assert lines["clip_text"] is None
    assert set(lines["unet"]["ms_a_row"]) >= {"onnxruntime", "openvino fp32"}
    config = read_config(folder / "unet" / "config.pbtxt")
    assert "execution_accelerators" in config["optimization"]
    engine = open_engine(folder)
    try:
        (picture,) = paint(engine, ["a red circle"])
    finally:
        engine.close()
    assert picture.std() > 0


def test_a_choice_without_openvino_says_so():
    choice = Choice("onnxruntime", "fp32", {}, {"openvino": "it is not installed"})
    assert choice.describe("unet").endswith("; not openvino: it is not installed")


def test_an_error_is_a_share_of_the_largest_output():
    assert output_error(np.array([1.0, -4.0]), np.array([1.0, -5.0])) == pytest.approx(0.2)
    assert output_error(np.uint8([3]), np.uint8([4])) == 0.25  # bytes do not wrap
