"""`benchmarks.perf_analyzer`: reports, counters, arrivals, and the real binary if it is there."""

from __future__ import annotations

import json

import numpy as np
import pytest
from harness import ROOT

from benchmarks.perf_analyzer.binary import FOLDER, find_binary
from benchmarks.perf_analyzer.measure import (
    Door,
    PerfAnalyzerError,
    measure,
    parse_counters,
    parse_report,
    per_image,
    poisson_intervals,
    run,
)
from benchmarks.perf_analyzer.plots import draw, knee
from twinbrush.engine.fields import InvalidArgument
from twinbrush.engine.request import FIELDS, GenerationRequest

SAMPLES = ROOT / "tests" / "samples"
INPUTS = ROOT / "benchmarks" / "inputs"


def test_a_report_is_read_in_the_order_of_its_loads():
    points = parse_report((SAMPLES / "perf_analyzer_concurrency.csv").read_text())
    assert [(p.load, p.value) for p in points] == [("concurrency", 1), ("concurrency", 4)]
    assert points[1].images_per_second == 8.53
    assert points[1].p99_ms == 817.73
    assert points[1].network_ms == 311.6


def test_a_report_of_the_stream_with_a_rate_is_read():
    (point,) = parse_report((SAMPLES / "perf_analyzer_rate_stream.csv").read_text())
    assert (point.load, point.value, point.p50_ms) == ("rate", 8, 155.26)


@pytest.mark.parametrize("text", ["", "Concurrency,Inferences/Second\n1,2\n", "a,b\n1,2\n"])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(ValueError, match="is no report"):
        parse_report(text)


def test_counters_are_spread_over_the_images_of_the_door():
    def text(calls: int, unet: int, busy: int) -> str:
        return (
            f'nv_inference_exec_count{{model="text_to_image",version="1"}} {calls}\n'
            f'nv_inference_exec_count{{model="unet",version="1"}} {unet}\n'
            f'nv_inference_compute_infer_duration_us{{model="unet",version="1"}} {busy}\n'
        )

    before, after = parse_counters(text(2, 10, 5000)), parse_counters(text(6, 30, 45000))
    assert per_image(before, after, "text_to_image")["unet"] == {"calls": 5, "compute": 10}
    assert per_image(after, after, "text_to_image") == {}


def test_arrivals_keep_their_rate_and_are_not_even():
    gaps = np.array(poisson_intervals(rate=8, seconds=50)) / 1e6
    assert len(gaps) == 400
    assert gaps.sum() == pytest.approx(50, abs=0.01)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.2)


def test_the_knee_is_where_latency_begins_to_cost_more_than_throughput_gains(tmp_path):
    points = [
        {"protocol": "grpc", "load": load, "value": x, "images_per_second": y, "average_ms": ms,
         "p50_ms": ms, "p90_ms": ms, "p99_ms": ms}
        for load in ("concurrency", "rate")
        for x, y, ms in ((1, 1, 10), (2, 2, 11), (4, 4, 30), (8, 5, 90))
    ]  # fmt: skip
    assert knee(points)["value"] == 2
    draw(points, "title", tmp_path / "images" / "plot.png")
    assert (tmp_path / "images" / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("file", sorted(INPUTS.glob("*.json")), ids=lambda file: file.stem)
def test_input_files_hold_fields_of_the_door(file):
    for entry in json.loads(file.read_text())["data"]:
        assert entry["prompt"]
        for name in entry:
            assert name in FIELDS
            assert "stream" in file.stem or not FIELDS[name].stream_only


def test_random_data_is_refused_with_the_input_file_to_use(engine):
    wrong = {name: np.array([-1] * field.count) for name, field in FIELDS.items()}
    with pytest.raises(InvalidArgument, match=r"prompt=-1 is invalid.*inputs/mixed\.json"):
        GenerationRequest.parse(wrong, engine.config)
    with pytest.raises(InvalidArgument) as refusal:
        GenerationRequest.parse({"prompt": np.array([-1])}, engine.config)
    assert "perf_analyzer" not in str(refusal.value)


@pytest.mark.skipif(not find_binary(ROOT / FOLDER), reason="run `make perf-analyzer`")
def test_the_real_binary_measures_the_server(server, tmp_path):
    binary = find_binary(ROOT / FOLDER)
    assert binary
    data = tmp_path / "input.json"
    data.write_text(json.dumps({"data": [{"prompt": ["a red circle"], "steps": [2]}]}))
    door = Door("grpc", "text_to_image", ("-i", "grpc", "--async"), server.address, data)
    metrics = f"http://127.0.0.1:{server.metrics}/metrics"
    point = measure(binary, door, "concurrency", 2, 0.5, metrics)
    assert point["images_per_second"] > 0
    assert 0 < point["server"]["unet"]["calls"] <= 2
    with pytest.raises(PerfAnalyzerError, match=r"--input-data benchmarks/inputs/mixed\.json"):
        run(binary, ["-m", "text_to_image", "-i", "grpc", "-u", server.address])
