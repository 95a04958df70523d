"""The stages as commands: devices, pictures of a run, kills, and all stages in a row."""

from __future__ import annotations

import csv
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_captioned import MIXED, many, write
from transformers import CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

from examples.scenes import reward, world
from examples.scenes import train as every_stage
from examples.scenes.world import SceneWorld
from export.checkpoint import open_checkpoint
from training import data, diffusion, distill, run, sheets, vqgan
from training.captioned import Captioned
from training.cli import pick_device, stage_cli
from training.preparation import BOUNDS

Run = partial(run.Run, source=SceneWorld())
ROOT = Path(__file__).parent.parent
TOWER = CLIPVisionConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    image_size=64, patch_size=8, projection_dim=16,
)  # fmt: skip


def command_of(module: tuple[str, ...], folder: Path, *flags: str) -> list[str]:
    return [
        sys.executable, "-m", *module, "--checkpoint", str(folder / "checkpoint"),
        "--runs", str(folder / "runs"), "--batch", "4", "--threads=1", "--device", "cpu", *flags,
    ]  # fmt: skip


def stage_command(stage: str, folder: Path, *flags: str) -> list[str]:
    """On scenes, unless `flags` name data."""
    module = (f"training.{stage}",) if "--data" in flags else ("examples.scenes.train", stage)
    return command_of(module, folder, *flags)


def run_stage(stage: str, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    command = stage_command(stage, folder, *flags)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def refused(monkeypatch, tmp_path):
    """Runs a stage in this process, which has its imports; gives the sentence that it ends with."""

    def run(stage: str, *flags: str) -> str:
        module, *name = stage.split()
        command = command_of((module, *name), tmp_path, *flags)
        before = list(tmp_path.iterdir())
        monkeypatch.setattr(sys, "argv", [word for word in command[2:] if word != "--threads=1"])
        monkeypatch.delitem(sys.modules, module, raising=False)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__")
        assert list(tmp_path.iterdir()) == before
        return ended.value.code

    return run


@pytest.mark.parametrize("name", ["gpu", "cuda:0", ""])
def test_an_unknown_device_is_named(name):
    with pytest.raises(ValueError, match=f"--device: '{name}' is not one of auto, cpu, cuda"):
        pick_device(name)


def test_cuda_without_a_gpu_is_one_clear_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device: 'cuda' needs an NVIDIA GPU"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"


def test_a_command_with_a_bad_device_says_so_and_writes_nothing(tmp_path):
    ended = run_stage("clip", tmp_path, "--device", "tpu")
    assert ended.returncode == 1
    assert ended.stderr == "error: --device: 'tpu' is not one of auto, cpu, cuda\n"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_clear_sentence(refused, tmp_path):
    (tmp_path / "file").touch()
    said = refused(
        "examples.scenes.train clip", "--runs", str(tmp_path / "file" / "runs"), "--steps", "1"
    )
    assert said.startswith("error: [Errno 20] Not a directory")


def test_a_stage_that_starts_anew_refuses_init(refused, tmp_path, tmp_path_factory):
    data = write("jsonl", tmp_path_factory.mktemp("data"))
    said = refused("training.clip", "--init", str(tmp_path), "--data", str(data))
    assert said == "error: --init: this stage starts from random weights and takes none"


def test_a_stage_refuses_a_checkpoint_that_lacks_a_tensor_before_it_computes(refused, tmp_path):
    shutil.copytree(ROOT / "checkpoints" / "scenes-64", tmp_path / "checkpoint")
    (file,) = (tmp_path / "checkpoint" / "bert").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["embeddings.word_embeddings.weight"]
    save_file(tensors, file, {"format": "pt"})
    assert refused("examples.scenes.train diffusion", "--steps", "1") == (
        f"error: {file.parent} lacks 1 of its tensors, embeddings.word_embeddings.weight first:"
        " download it again"
    )
    assert not (tmp_path / "runs").exists()


def test_a_stage_does_not_overwrite_what_it_starts_from(refused, tmp_path, tmp_path_factory):
    same = tmp_path / "checkpoint"
    data = write("jsonl", tmp_path_factory.mktemp("data"))
    said = refused("training.diffusion", "--init", str(same), "--data", str(data))
    assert said == f"error: --init: {same} is the --checkpoint to write; write another"


@pytest.mark.parametrize(
    ("stage", "steps", "kind"),
    [
        pytest.param("bert", 12, None, marks=pytest.mark.slow),
        pytest.param("vqgan", 16, None, marks=pytest.mark.slow),  # four are the decoder's
        ("clip", 12, "tar"),
    ],
)
def test_a_killed_stage_ends_with_the_weights_of_an_undisturbed_one(tmp_path, stage, steps, kind):
    flags = ["--steps", str(steps), "--save-every", "3"]
    if kind:
        folder = write(kind, tmp_path / "data", many(30) + MIXED)
        flags += ["--data", str(folder), "--shuffle", "7"]
    killed = tmp_path / "killed"
    if stage == "vqgan":
        tower = CLIPVisionModelWithProjection(TOWER)
        for folder in (tmp_path / "whole", killed):
            tower.save_pretrained(folder / "checkpoint" / "image_encoder")
    whole = run_stage(stage, tmp_path / "whole", *flags)
    assert whole.returncode == 0, whole.stderr
    trained = tmp_path / "whole" / "runs" / stage / "tokenizer"
    if trained.exists():  # the library orders a tokenizer's letters anew in every process
        shutil.copytree(trained, killed / "runs" / stage / "tokenizer")
    process = subprocess.Popen(
        stage_command(stage, killed, *flags), cwd=ROOT, stdout=subprocess.DEVNULL
    )
    state = killed / "runs" / stage / "state.safetensors"
    while not state.exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    theirs = load_file(tmp_path / "whole" / "runs" / stage / "state.safetensors")
    assert load_file(state)["ema.n_averaged"] < theirs["ema.n_averaged"]
    resumed = run_stage(stage, killed, *flags)
    assert resumed.returncode == 0, resumed.stderr
    ours = load_file(state)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0, msg=name)
    if kind:
        assert resumed.stdout.splitlines()[-1] == whole.stdout.splitlines()[-1]
        assert "used; left out: " in whole.stdout
    curves = [folder / "runs" / stage / "losses.csv" for folder in (tmp_path / "whole", killed)]
    assert curves[0].read_text() == curves[1].read_text()


def test_a_stage_needs_data(refused):
    assert refused("training.bert").startswith(
        "error: --data is required: a folder of pictures and"
    )


def test_scenes_need_no_data_and_name_their_stages(refused):
    said = refused("examples.scenes.train nothing")
    assert said.startswith("error: STAGE: 'nothing' is not one of clip, bert, vqgan,")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "{}/nowhere"], "error: --data: {}/nowhere does not exist"),
        (["--data", "{}", "--keep", "x<1"],
         "error: --keep: 'x<1' is not COLUMN>=NUMBER or COLUMN<=NUMBER"),
        (["--data", "{}"], "error: --data: {} is empty"),
    ],
)  # fmt: skip
def test_a_command_with_bad_data_says_so_and_writes_nothing(refused, tmp_path, flags, message):
    assert refused("training.bert", *(f.format(tmp_path) for f in flags)) == message.format(
        tmp_path
    )


def test_bounds_of_one_column_all_count_and_take_the_place_of_its_default(tmp_path, monkeypatch):
    runs, (default, *others) = [], BOUNDS
    asked = [f"{default.column}>=0.1", f"{default.column}<=0.3"]
    flags = [word for text in asked for word in ("--keep", text)]
    folder = write("jsonl", tmp_path / "data", many(3))
    monkeypatch.setattr(sys, "argv", ["stage", "--checkpoint", "x", "--data", str(folder), *flags])

    def train(run):
        runs.append(run)

    with pytest.raises(SystemExit) as ended:
        stage_cli(train, 1, 1)
    assert ended.value.code == 0
    assert [*map(str, runs[0].source.preparation.bounds)] == [*map(str, others), *asked]


def test_every_stage_trains_on_captioned_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion, "Painter", partial(diffusion.Painter, channels=32))
    source = Captioned(write("parquet", tmp_path / "data", many(10) + MIXED))
    checkpoint, runs = tmp_path / "checkpoint", tmp_path / "runs"
    every_stage.train(Run(checkpoint, runs, 4, 4, source=source))
    opened = open_checkpoint(checkpoint)
    assert opened.index["defaults"] == distill.DEFAULTS
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
    assert len(tokenizer("picture number")["input_ids"]) == 4  # two words of these captions
    for stage in ("distill", "align"):
        with safe_open(runs / stage / "state.safetensors", "pt") as file:
            assert json.loads(file.metadata()["position"])["counts"]["used"] == 16
    assert "missing" not in (runs / "align" / "losses.csv").read_text()  # nobody knows the truth
    assert not (checkpoint / "reward_model").exists()
    assert not (runs / "spell_out_relations").exists()
    with pytest.raises(data.BadInput, match=r"--data: the stage reward needs scenes"):
        reward.train(Run(checkpoint, runs, 4, 4, source=source))


@pytest.mark.slow
def test_all_stages_run_in_order_and_tell_their_times(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "SCENES", 100)
    monkeypatch.setattr(diffusion, "Painter", partial(diffusion.Painter, channels=32))
    monkeypatch.setattr(reward, "PICTURES", 100)
    runs = tmp_path / "runs"
    every_stage.train(Run(tmp_path / "checkpoint", runs, 4, 4))
    times = json.loads((runs / "times.json").read_text())
    assert " ".join(times) == (
        "clip bert vqgan diffusion distill spell_out_relations reward align decoder"
    )
    assert all(seconds > 0 for seconds in times.values())
    for stage in times:
        assert Image.open(runs / stage / "losses.png").size[0] > 500
    columns = sheets.MARGIN + 4 * (sheets.TILE + sheets.MARGIN)
    for stage in ("diffusion", "distill", "align"):
        assert Image.open(runs / stage / "samples.png").size[0] == columns
    originals = np.asarray(Image.open(runs / "vqgan" / "samples.png"))
    shown = SceneWorld().sample(vqgan.SHOWN, 8).pictures
    assert (originals[: sheets.TILE] == np.asarray(sheets.grid(shown, 8))[: sheets.TILE]).all()
    assert Image.open(runs / "clip" / "samples.png").size[0] > 500


def test_time_is_added_up_over_sessions_and_written_while_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(every_stage, "WRITE_EVERY", 0.02)
    path = tmp_path / "times.json"
    path.write_text('{"clip": 100.0, "bert": 7.0}')
    with every_stage.timed(path, "clip"):
        time.sleep(0.3)
        during = json.loads(path.read_text())
    assert during["bert"] == 7.0
    assert 100.0 < during["clip"] <= json.loads(path.read_text())["clip"] < 130


def test_workers_draw_the_scenes_that_the_steps_name():
    worlds = SceneWorld(workers=2), SceneWorld()
    ahead, on_demand = (each.batches(7, 3, data.CPU) for each in worlds)
    for step in (5, 6, 7):
        theirs, ours = on_demand.at(step), ahead.at(step)
        assert ours.captions == theirs.captions
        assert torch.equal(ours.pictures, theirs.pictures)


def test_a_loss_curve_keeps_every_column(tmp_path):
    with (tmp_path / "losses.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["step", "loss", "psnr"], [10, 1.0, 20.0], [20, 0.5, 24.0]])
    sheets.draw_losses(tmp_path / "losses.csv", tmp_path / "two.png")
    (tmp_path / "losses.csv").write_text("step,loss\n10,1.0\n")
    sheets.draw_losses(tmp_path / "losses.csv", tmp_path / "one.png")
    two, one = (Image.open(tmp_path / name).size for name in ("two.png", "one.png"))
    assert two[1] == 2 * one[1]


@pytest.fixture
def averaged(monkeypatch, capsys):
    """Runs the command in this process; gives the last line that it prints or ends with."""
    module = "examples.scenes.average_weights"

    def run(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        monkeypatch.delitem(sys.modules, module, raising=False)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__")
        failed = bool(ended.value.code)
        said = ended.value.code if failed else capsys.readouterr().out
        assert failed == said.startswith("error: ")
        return said.splitlines()[-1]

    return run


def test_an_average_is_the_mean_of_the_named_checkpoints(averaged, tmp_path):
    made, one, two, other = (tmp_path / name for name in ("made", "one", "two", "other"))
    for folder, value, side in ((made, 7, 2), (one, 1, 2), (two, 4, 2), (other, 1, 3)):
        (folder / "unet").mkdir(parents=True)
        tensors = {"w": torch.full((side, 2), float(value)), "b": torch.tensor([value * 1e-4])}
        save_file({k: v.half() for k, v in tensors.items()}, folder / "unet" / "x.safetensors")
    assert averaged("--checkpoint", made, one, two, one).endswith("is the mean of 3")
    found = load_file(made / "unet" / "x.safetensors")
    assert found["w"].dtype == torch.float16
    assert found["w"].tolist() == [[2, 2], [2, 2]]
    assert found["b"].item() == pytest.approx(2e-4, rel=1e-3)
    said = averaged("--checkpoint", made, one, other)
    assert said.startswith(f"error: {other}/unet/x.safetensors has the weights of another model")
    said = averaged("--checkpoint", made, one, "--part", "vae")
    assert said == f"error: --part: {made}/vae has 0 files of weights, not one"
    assert load_file(made / "unet" / "x.safetensors").keys() == found.keys()
    assert [path.name for path in (made / "unet").iterdir()] == ["x.safetensors"]
