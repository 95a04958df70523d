"""Calls and pictures are bounded by memory: what is measured, what is admitted, what is refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import onnx
import pytest
from harness import open_engine
from onnx import TensorProto, helper
from test_engine import Client, Watched, request

from export.checkpoint import open_checkpoint
from export.macs import count_work
from export.memory import Growth, MeasureError, fit, measure
from export.repository import growth_of, load_parts
from export.unet import MAX_CHUNKS
from twinbrush import memory
from twinbrush.engine.config import PipelineConfig, check_names
from twinbrush.engine.fields import InvalidArgument
from twinbrush.engine.limits import PARAMETERS, Limits
from twinbrush.engine.memory import CallMemory, DeviceMemory, MemoryBudget, NetworkMemory
from twinbrush.engine.plan import Planner
from twinbrush.runtimes.attention import MOST_PAIRS, is_whole, with_blocks
from twinbrush.runtimes.onnx_runtime import open_session

SD15 = NetworkMemory(
    CallMemory(3.5e9, 50e3, 32, MOST_PAIRS), CallMemory(0.3e9, 600e3, 4, MOST_PAIRS), 0.5e9
)
WIDE, HEADS = 32, 4


# The budget ------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [True, False])
def test_calls_that_are_admitted_never_hold_more_than_the_budget(blocks):
    rng = random.Random(3)
    for _ in range(500):
        device = DeviceMemory(rng.uniform(4, 200) * 1e9, blocks)
        budget = MemoryBudget(SD15, device, native=64**2, largest=256**2, least_rows=2)
        networks, most = budget.networks, [0.0, 0.0]
        for _ in range(20):
            cells = rng.randint(1, 256**2)
            if budget.fits(cells, 2):
                unet = budget.rows(cells) * networks.unet.row(cells)
                decoder = budget.pictures(cells) * networks.decoder.row(cells)
                most = [max(most[0], unet), max(most[1], decoder)]
        assert networks.rest + sum(most) <= budget.budget * (1 + 1e-9) or most == [0.0, 0.0]


def test_a_larger_budget_admits_larger_pictures_and_calls_of_more_rows():
    budgets = [
        MemoryBudget(SD15, DeviceMemory(size * 1e9), 64**2, 256**2, 2) for size in (8, 16, 64)
    ]
    assert [b.largest for b in budgets] == sorted({b.largest for b in budgets})
    assert [b.rows(64**2) for b in budgets] == sorted({b.rows(64**2) for b in budgets})
    assert budgets[0].fits(64**2, 2)
    assert not budgets[0].fits(256**2, 2)


def test_a_budget_that_nobody_chose_has_room_for_one_native_image():
    small = DeviceMemory(1e9, chosen=False)
    assert MemoryBudget(SD15, small, 64**2, 256**2, 2).fits(64**2, 2)
    chosen = replace(small, chosen=True)
    assert not MemoryBudget(SD15, chosen, 64**2, 256**2, 2).fits(64**2, 2)


def test_runtimes_without_blocks_need_the_square_of_the_cells():
    image = SD15.without_blocks().image(128**2, 2) - SD15.image(128**2, 2)
    assert image == pytest.approx((2 * 32 + 4) * (128**4 - MOST_PAIRS))


# The engine ------------------------------------------------------------------------------------


@pytest.fixture
def watched(repository) -> Watched:
    return Watched(repository)


def pipeline(repository) -> PipelineConfig:
    return PipelineConfig.load(repository / "text_to_image_stream" / "1" / "pipeline.json")


def for_images(repository, side: int, rows: int) -> DeviceMemory:
    """Memory that has room for calls of so many rows at a size, and no larger pictures."""
    networks, cells = pipeline(repository).memory, (side // 4) ** 2
    assert networks is not None
    return DeviceMemory(networks.image(cells, rows) * (1 + 1e-6))


def test_a_picture_that_never_fits_is_refused_with_its_need_before_any_call(repository, watched):
    device = for_images(repository, 64, 2)
    engine = open_engine(repository, watched, limits=Limits(memory=device))
    with pytest.raises(InvalidArgument) as refused:
        Client(engine, request(engine, width=128, height=128, guidance_scale=3.0))
    for part in ("width=128", "height=128", f"{device.budget / 1e9:.1f} GB", "memory_mb"):
        assert part in str(refused.value)
    assert watched.calls == []
    assert Client(engine, request(engine, width=64, height=64, guidance_scale=3.0)).error is None
    engine.close()


def test_calls_have_as_many_rows_and_pictures_as_memory_allows(repository, watched):
    device = for_images(repository, 32, 3)
    config = replace(pipeline(repository), side_limit=32)
    planner = Planner(config, 32, device)
    asked = request(open_engine(repository), guidance_scale=1.0)
    assert planner.rows(planner.key(asked)) == 3
    assert planner.pictures(planner.key(asked), 32) == 1
    engine = open_engine(repository, watched, limits=Limits(max_side=32, memory=device))
    asked = request(engine, num_images=7, steps=1, guidance_scale=1.0)
    assert Client(engine, asked).error is None
    assert sum(watched.calls) == 7
    assert max(watched.calls) <= 3
    engine.close()


def test_a_repository_without_measurements_is_served_by_size_alone(repository, tmp_path):
    file = repository / "text_to_image_stream" / "1" / "pipeline.json"
    fields = json.loads(file.read_text())
    del fields["memory"]
    (tmp_path / "pipeline.json").write_text(json.dumps(fields))
    old = PipelineConfig.load(tmp_path / "pipeline.json")
    assert old.memory is None
    planner = Planner(old, 32, DeviceMemory(1.0))
    asked = request(open_engine(repository), width=64, height=64)
    planner.check_memory(asked)
    assert planner.rows(planner.key(asked)) == 8


def test_a_memory_entry_of_another_form_names_the_file(repository, tmp_path):
    file = repository / "text_to_image_stream" / "1" / "pipeline.json"
    (tmp_path / "pipeline.json").write_text(
        json.dumps(json.loads(file.read_text()) | {"memory": {"unet": 3}})
    )
    with pytest.raises(ValueError, match=r"pipeline\.json is not a pipeline\.json"):
        PipelineConfig.load(tmp_path / "pipeline.json")


def test_an_operator_bounds_sides_and_pixels(repository):
    limits = Limits(max_side=64, max_pixels=2048)
    engine = open_engine(repository, limits=limits)
    with pytest.raises(ValueError, match=r"width=72 is invalid.*between 8 and 64"):
        request(engine, width=72)
    with pytest.raises(ValueError, match="width=64 is invalid: must make at most 2048 pixels"):
        request(engine, width=64, height=64)
    assert Client(engine, request(engine, width=64, height=32, steps=1)).error is None
    engine.close()
    for bad in (Limits(max_side=16), Limits(max_pixels=1000)):
        with pytest.raises(ValueError, match="for the native size"):
            open_engine(repository, limits=bad)
    with pytest.raises(ValueError, match=r"max_side=129.*at most 128, the checkpoint's own bound"):
        open_engine(repository, limits=Limits(max_side=129))


def test_parameters_that_are_missing_or_empty_bound_nothing():
    names = {"max_rows": "32", "queue_size": "8", "queue_work": "9", "call_seconds": "60",
             "row_buckets": "", "max_side": ""}  # fmt: skip
    config = {"parameters": {name: {"string_value": value} for name, value in names.items()}}
    device = DeviceMemory(5e9, chosen=False)
    limits = Limits.of_config(config, device)
    assert (limits.max_side, limits.max_pixels, limits.memory) == (None, None, device)
    config["parameters"]["memory_mb"] = {"string_value": "2000"}
    assert Limits.of_config(config, device).memory == DeviceMemory(2e9, chosen=True)
    config["parameters"]["max_side"] = {"string_value": "wide"}
    with pytest.raises(ValueError, match="max_side"):
        Limits.of_config(config)


@pytest.mark.parametrize("name", sorted(set(PARAMETERS) - {"row_buckets"}))
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "1e3", "9" * 400, "9" * 5000, "\u0663", "1,2"])
def test_a_wrong_number_of_a_parameter_is_refused_in_one_sentence(name, value):
    numbers = dict.fromkeys(PARAMETERS, "64") | {name: value}
    config = {"parameters": {key: {"string_value": text} for key, text in numbers.items()}}
    with pytest.raises(ValueError, match=f"^parameter {name} of config.pbtxt is .*whole") as caught:
        Limits.of_config(config)
    assert len(str(caught.value)) < 200


def test_a_clients_share_is_at_most_the_whole():
    numbers = dict.fromkeys(PARAMETERS, "64") | {"client_work": "101"}
    config = {"parameters": {key: {"string_value": text} for key, text in numbers.items()}}
    with pytest.raises(ValueError, match=r"client_work=101 .* must be at most 100"):
        Limits.of_config(config)


def test_a_parameter_that_is_unknown_is_named():
    check_names({"parameters": {"max_rows": {}, "EXECUTION_ENV_PATH": {}}}, PARAMETERS)
    with pytest.raises(ValueError, match=r"memory of config.pbtxt is unknown: .*memory_mb"):
        check_names({"parameters": {"memory": {"string_value": "9"}}}, PARAMETERS)


def test_a_budget_without_room_for_any_picture_is_logged(repository, caplog):
    open_engine(repository, limits=Limits(memory=DeviceMemory(1.0))).close()
    assert "memory_mb leaves no room" in caplog.text


# The machine -----------------------------------------------------------------------------------


def test_the_control_group_bounds_memory(tmp_path):
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    meminfo.write_text("MemTotal: 9000000 kB\nMemAvailable:    8000000 kB\n")
    nobody = 2**22 + 1  # more than any process id
    assert memory.available_memory(nobody, meminfo, tmp_path / "none", tmp_path) == 8e6 * 1024
    cgroup.write_text("0::/box/inner\n")
    (tmp_path / "box" / "inner").mkdir(parents=True)
    (tmp_path / "box" / "inner" / "memory.max").write_text("max\n")
    (tmp_path / "box" / "memory.max").write_text("3000000000\n")
    assert memory.available_memory(nobody, meminfo, cgroup, tmp_path) == 3e9
    cgroup.write_text("4:memory:/old\n")
    (tmp_path / "memory" / "old").mkdir(parents=True)
    (tmp_path / "memory" / "old" / "memory.limit_in_bytes").write_text("2000000000\n")
    assert memory.available_memory(nobody, meminfo, cgroup, tmp_path) == 2e9


def test_a_gpu_bounds_memory_by_what_it_has_free(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    device = tmp_path / "nvidiactl"
    assert memory.gpu_memory(device) is None
    device.touch()
    assert memory.gpu_memory(device) is None  # without nvidia-smi
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 40000\necho 30000\n")
    tool.chmod(0o755)
    assert memory.gpu_memory(device) == 30000 * 2**20
    found = memory.device_memory(device)
    assert (found.blocks, found.chosen) == (False, False)


# Attention in blocks ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attention(tmp_path_factory):
    """A file with one self-attention and one over a fixed number of keys."""
    nodes = [
        helper.make_node("Attention", ["x", "x", "x"], ["y"], q_num_heads=HEADS,
                         kv_num_heads=HEADS, scale=0.1),
        helper.make_node("Attention", ["y", "words", "words"], ["z"], q_num_heads=HEADS,
                         kv_num_heads=HEADS),
    ]  # fmt: skip

    def value(name, length):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", length, WIDE])

    inputs = [value("x", "n"), value("words", 5)]
    graph = helper.make_graph(nodes, "g", inputs, [value("z", "n")], value_info=[value("y", "n")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    file = tmp_path_factory.mktemp("attention") / "model.onnx"
    onnx.save(model, file)
    return file


def rows(positions: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"x": (2, positions, WIDE), "words": (2, 5, WIDE)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def test_attention_in_blocks_is_the_same_and_small_calls_keep_their_bits(attention):
    import onnxruntime as ort

    plain, blocks = ort.InferenceSession(str(attention)), open_session(attention, {})
    for positions in (7, 1024):
        given = rows(positions)
        assert np.array_equal(plain.run(None, given)[0], blocks.run(None, given)[0])
    given = rows(1025)
    np.testing.assert_allclose(
        plain.run(None, given)[0], blocks.run(None, given)[0], rtol=1e-4, atol=1e-5
    )


def test_large_attention_does_not_hold_its_weights(attention, tmp_path):
    config = tmp_path / "config.pbtxt"
    config.write_text('name: "m"\n')
    positions = 4096
    found = measure(attention, config, [positions])
    ((_, taken),) = found["rows"]
    assert found["whole"] is False
    assert taken < 4 * HEADS * positions**2 / 4


def test_only_attention_over_varying_positions_is_rewritten(attention, repository):
    rewritten = onnx.load_from_string(with_blocks(attention))
    operators = [node.op_type for node in rewritten.graph.node]
    assert operators.count("If") == operators.count("Attention") == 1
    assert not is_whole(attention)
    assert with_blocks(repository / "fusion" / "1" / "model.onnx") is None


# The measurement -------------------------------------------------------------------------------


def test_an_export_measures_what_calls_take(repository):
    entry = json.loads((repository / "text_to_image_stream" / "1" / "pipeline.json").read_text())[
        "memory"
    ]
    for model in ("unet", "vqgan_decoder"):
        calls = CallMemory(**{k: v for k, v in entry[model].items() if k != "rows"})
        assert calls.rest > 0
        for cells, taken in entry[model]["rows"]:
            assert calls.row(cells) >= taken * (1 - 1e-9)


def test_the_unet_is_measured_with_the_longest_prompt(repository):
    """A row of many tokens holds more than one of few, so that long prompts are foreseen."""
    file = repository / "unet" / "1" / "model.onnx"
    config = file.parents[1] / "config.pbtxt"
    few, many = (measure(file, config, [32], tokens)["rows"][0][1] for tokens in (16, 4096))
    assert many > few + 4 * 4096 * 32  # the tokens of one row in FP32


def test_growth_has_the_tokens_of_the_longest_prompt(tiny):
    opened = open_checkpoint(tiny)
    parts = load_parts(opened)
    longest = MAX_CHUNKS * parts["clip_text"].inputs["input_ids"].axes[0]
    assert growth_of(opened, parts["unet"], count_work(parts["unet"])).tokens == longest
    assert growth_of(opened, parts["vqgan_decoder"], count_work(parts["vqgan_decoder"])).tokens == 1


def test_sizes_that_were_not_tried_take_at_most_what_is_foreseen(repository):
    file = repository / "vqgan_decoder" / "1" / "model.onnx"
    config = file.parents[1] / "config.pbtxt"
    growth = Growth((16, 16), 8, 1e6, 1.0, 1.0)
    found = measure(file, config, [32, 48, 64, 128])
    calls = fit(found | {"rows": found["rows"][:3]}, growth)
    cells, taken = found["rows"][3]
    calls.pop("rows")
    assert CallMemory(**calls).row(cells) >= 0.8 * taken


def test_whole_attention_is_foreseen_at_sizes_that_do_not_show_it():
    growth = Growth((64, 64), 8, 1e12, weights=8.0, pairs=1.0)
    rows = [[n, 10e6 + 20e3 * n] for n in (256, 512)]
    calls = fit({"rest": 1, "rows": rows, "whole": True}, growth)
    assert calls["square"] == 32.0
    assert calls["blocks"] is None
    blocks = fit({"rest": 1, "rows": rows, "whole": False}, growth)["blocks"]
    assert blocks == MOST_PAIRS


def test_a_model_that_cannot_be_measured_says_why(tmp_path):
    folder = tmp_path / "unet" / "1"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"nothing")
    (tmp_path / "config.pbtxt").write_text('name: "unet"\n')
    with pytest.raises(MeasureError, match="unet: "):
        measure(folder / "model.onnx", tmp_path / "config.pbtxt", [8])
