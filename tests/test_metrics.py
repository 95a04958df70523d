"""What the engine records, and the documents, dashboard and alerts that name its metrics."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
import threading
from collections import defaultdict

import pytest
from harness import ROOT, open_engine
from test_engine import Client, Watched, request

from twinbrush.engine import metrics
from twinbrush.engine.fields import InvalidArgument
from twinbrush.engine.generation import EngineError
from twinbrush.engine.limits import Limits
from twinbrush.engine.memory import DeviceMemory
from twinbrush.engine.request_ids import LONGEST, LineFormatter, named, request_id_of
from twinbrush.engine.tracing import Marks, Origin

PROMETHEUS = ROOT / "deploy" / "prometheus"
OWN = re.compile(r"twinbrush_\w+")


class Recorded:
    """An observer that keeps every value, and refuses what the table of metrics does not allow."""

    def __init__(self):
        self.values = defaultdict(list)

    def record(self, metric, value, *labels):
        assert metric in metrics.METRICS
        for allowed, label in zip(metric.labels.values(), labels, strict=True):
            assert label in allowed or allowed == metrics.SERVED
        self.values[(metric, *labels)].append(value)

    def total(self, metric, *labels) -> float:
        return sum(self.values[(metric, *labels)])


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


def test_every_image_is_recorded_with_all_its_stages(repository, recorded):
    engine = open_engine(repository, observer=recorded)
    first = Client(engine, request(engine, num_images=2, steps=3)).wait()
    Client(engine, request(engine, width=2 * engine.config.native_side, steps=1)).wait()
    engine.close()
    assert first.error is None
    assert recorded.total(metrics.IMAGES, "native") == 2
    assert recorded.total(metrics.IMAGES, "2x") == 1
    for stage in metrics.STAGES:
        assert [len(recorded.values[metrics.STAGE_SECONDS, stage, size]) for size in
                metrics.SIZES] == [0, 2, 1, 0]  # fmt: skip
    assert recorded.total(metrics.CACHE_TEXTS, "miss") + recorded.total(
        metrics.CACHE_TEXTS, "hit"
    ) == 4  # fmt: skip
    assert recorded.total(metrics.CACHE_TEXTS, "hit") == 2
    assert len(recorded.values[metrics.REQUEST_SECONDS, "OK"]) == 2


def test_the_stages_of_an_image_add_up_to_its_time():
    marks = Marks(
        1.0, 3.0, 7.0, denoising=15.0, call_began=29.0, denoised=31.0, decoded=63.0, finished=127.0
    )
    stages = marks.stages()
    assert {stage.name for stage in stages} == set(metrics.STAGES)
    assert [stage.seconds for stage in stages] == [2, 4, 8, 16, 32, 64]


def test_rows_of_shared_calls_and_their_share_of_the_capacity(repository, recorded):
    watched = Watched(repository)
    engine = open_engine(repository, watched, observer=recorded, limits=Limits(max_rows=8))
    Client(engine, request(engine, num_images=4, guidance_scale=7.0, steps=3)).wait()
    engine.close()
    assert recorded.values[metrics.CALL_ROWS, "native"] == watched.calls == [8, 8, 8]
    assert recorded.values[metrics.CALL_FILL, "native"] == [1.0] * 3
    assert len(recorded.values[metrics.MODEL_SECONDS, "unet"]) == 3
    assert recorded.values[metrics.MODEL_FAILURES, "unet"] == [0, 0, 0]  # alerts need the first
    assert len(recorded.values[(metrics.TICK_SECONDS,)]) == 3


def test_a_cancel_saves_the_work_that_was_left(repository, recorded):
    watched, entered, go_on = Watched(repository), threading.Event(), threading.Event()

    def hold(inputs):
        entered.set()
        assert go_on.wait(30)

    watched.before_unet = hold
    engine = open_engine(repository, watched, observer=recorded)
    client = Client(engine, request(engine, steps=50, guidance_scale=1.0))
    assert entered.wait(30)
    client.generation.cancel()
    go_on.set()
    assert client.error.code == "CANCELLED"
    engine.close()
    assert recorded.total(metrics.WORK_SAVED, "CANCELLED") == 50


def test_refusals_are_counted_by_their_reason(repository, recorded):
    engine = open_engine(repository, observer=recorded, limits=Limits(queue_size=1))
    held = request(engine, steps=50, num_images=4)
    client = Client(engine, held)
    with pytest.raises(EngineError, match="queue is full"):
        engine.submit(held, print)
    client.generation.cancel()
    client.wait()
    engine.drain(0)
    with pytest.raises(EngineError, match="shutting down"):
        engine.submit(held, print)
    engine.close()
    assert recorded.total(metrics.REFUSALS, "queue_full") == 1
    assert recorded.total(metrics.REFUSALS, "draining") == 1


def test_a_client_over_its_share_and_a_picture_over_the_budget_have_reasons_of_their_own(
    repository, recorded
):
    limits = Limits(memory=DeviceMemory(1.0))
    engine = open_engine(repository, observer=recorded, limits=limits)
    with pytest.raises(InvalidArgument, match="of memory"):
        engine.submit(request(engine), print)
    engine.close()
    engine = open_engine(repository, observer=recorded, limits=Limits(queue_work=1000))
    held = request(engine, steps=50, num_images=16, client="ada")
    client = Client(engine, held)
    with pytest.raises(EngineError, match="has its share"):
        engine.submit(held, print)
    client.generation.cancel()
    client.wait()
    engine.close()
    assert recorded.total(metrics.REFUSALS, "memory") == 1
    assert recorded.total(metrics.REFUSALS, "client_full") == 1


def test_the_memory_that_calls_take_of_the_budget_is_recorded(repository, recorded):
    engine = open_engine(repository, observer=recorded, limits=Limits(memory=DeviceMemory(4e9)))
    Client(engine, request(engine, steps=2)).wait()
    alone = recorded.values[(metrics.MEMORY_USED,)][-1]
    Client(engine, request(engine, steps=2, num_images=4)).wait()
    engine.close()
    assert recorded.values[(metrics.MEMORY_BUDGET,)] == [4e9]
    assert recorded.values[(metrics.CACHE_LIMIT,)] == [256 * 2**20]
    assert 0 < alone < max(recorded.values[(metrics.MEMORY_USED,)]) <= 4e9


def test_a_failed_call_is_counted_and_the_log_names_its_requests(repository, recorded, caplog):
    watched = Watched(repository)

    def fail(inputs):
        raise RuntimeError("broken")

    watched.before_unet = fail
    engine = open_engine(repository, watched, observer=recorded)
    caplog.set_level(logging.WARNING)
    ended = threading.Event()
    engine.submit(
        request(engine, num_images=2), lambda event: ended.set(), Origin("mine\nINFO forged")
    )
    assert ended.wait(30)
    engine.close()
    assert recorded.total(metrics.MODEL_FAILURES, "unet") >= 2
    assert recorded.total(metrics.CALL_RETRIES) == 1
    lines = [record.getMessage() for record in caplog.records]
    assert lines
    assert all("request id=mine_INFO_forged" in line for line in lines)


def test_ids_are_safe_in_a_log_and_bounded():
    assert request_id_of("order-1.b") == "order-1.b"
    assert request_id_of('a"\r\n\x1b[0m') == "a_____0m"
    assert len(request_id_of("x" * 10_000)) == LONGEST
    assert request_id_of("") != request_id_of("")
    assert named(["a"]) == named(["a", "a"]) == "request id=a"
    assert named(["a", "b"]) == "request ids=a,b"
    assert named(map(str, range(1000))).endswith("7,...")


def test_every_line_of_a_traceback_names_the_request():
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        info = sys.exc_info()
    record = logging.LogRecord(
        "x", logging.ERROR, "f.py", 1, "decoding failed: %s", (named(["a"]),), info
    )
    lines = LineFormatter("stream").format(record).splitlines()
    assert lines[0] == "stream: ERROR decoding failed: request id=a"
    assert lines[-1] == "stream: ERROR request id=a: second"
    assert all(line.startswith("stream: ERROR request id=a: ") for line in lines[1:])


def test_names_follow_prometheus_conventions():
    assert len({metric.name for metric in metrics.METRICS}) == len(metrics.METRICS)
    for metric in metrics.METRICS:
        assert re.fullmatch(r"twinbrush(_[a-z]+)+", metric.name)
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert not metric.help.endswith(".")


@pytest.mark.parametrize(
    "file", ["grafana/twinbrush.json", "prometheus/rules.yml", "prometheus/rules_test.yml"]
)
def test_dashboard_and_alerts_name_metrics_that_exist(file):
    known = {
        metric.name + end
        for metric in metrics.METRICS
        for end in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
    }
    found = set(OWN.findall((ROOT / "deploy" / file).read_text()))
    assert found
    assert found <= known


def test_the_dashboard_shows_every_metric():
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "twinbrush.json").read_text())
    shown = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    assert [metric.name for metric in metrics.METRICS if metric.name not in shown] == []


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize("arguments", ["check config prometheus.yml", "test rules rules_test.yml"])
def test_prometheus_takes_the_configuration_and_the_alerts_fire(arguments):
    command = ["promtool", *arguments.split()]
    done = subprocess.run(command, cwd=PROMETHEUS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
