"""The client package and its command line, against the real server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from harness import heard
from PIL import Image
from test_wire import SLOW, unet_calls, wait_for_a_call, work_stops

from twinbrush_client import Client, Picture, Preview, Progress, TwinbrushError

COMMAND = str(Path(sys.executable).parent / "twinbrush")


@pytest.fixture
def client(server):
    with Client(server.address) as client:
        yield client


def run(server, *arguments):
    command = [COMMAND, "generate", *arguments, "--server", server.address]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_generate_gives_pictures_that_know_their_seed(client):
    images = client.generate("a red circle", num_images=2, seed=7, steps=3)
    assert [image.info["seed"] for image in images] == [7, 8]
    assert [image.size for image in images] == [(32, 32)] * 2


def test_stream_yields_progress_previews_and_pictures(client):
    events = list(client.stream("a red circle", steps=3, preview_every=2, seed=1))
    assert [type(event) for event in events] == [Progress, Preview, Progress, Picture]
    assert events[1].image.size == (8, 8)
    assert (
        events[-1].image.tobytes() == client.generate("a red circle", steps=3, seed=1)[0].tobytes()
    )


@pytest.mark.parametrize("way", ["break", "cancel", "other thread"])
def test_a_stream_that_is_left_stops_the_work(client, server, way):
    with work_stops(server), client.stream("a red circle", **SLOW) as stream:
        events = iter(stream)
        next(events)
        if way == "cancel":
            stream.cancel()
        elif way == "other thread":
            threading.Thread(target=stream.cancel).start()
            with pytest.raises(TwinbrushError, match="cancelled"):
                list(events)


def test_what_the_server_refuses_is_an_error_with_its_code(client):
    with pytest.raises(TwinbrushError, match="steps=0 is invalid") as error:
        client.generate("a red circle", steps=0)
    assert error.value.code == "INVALID_ARGUMENT"
    with pytest.raises(TwinbrushError, match="steps=0 is invalid"):
        list(client.stream("a red circle", steps=0))


@pytest.mark.parametrize("fields", [{"seed": 2**63}, {"steps": "x"}, {"guidance_scale": "y"}])
def test_what_does_not_fit_its_type_is_named(client, fields):
    with pytest.raises(TwinbrushError, match=next(iter(fields))):
        client.generate("a red circle", **fields)


def test_a_field_that_is_none_is_named(client):
    with pytest.raises(TwinbrushError, match=r"step is no field: prompt, .*steps"):
        client.generate("a red circle", step=4)


@pytest.mark.parametrize("wanted", ["raw", "png_base64"])
def test_a_format_that_is_no_picture_is_refused_before_it_is_painted(client, server, wanted):
    before = unet_calls(server)
    for ask in (client.generate, client.stream):
        with pytest.raises(TwinbrushError, match=f"image_format='{wanted}' .*: png or jpeg are"):
            ask("a red circle", image_format=wanted)
    assert unet_calls(server) == before


def test_a_jpeg_is_a_picture(client):
    (image,) = client.generate("a red circle", steps=1, image_format="jpeg")
    assert image.format == "JPEG"


def test_a_server_that_is_not_there_is_an_error():
    with Client("127.0.0.1:1") as client:
        assert not client.ready()
        with pytest.raises(TwinbrushError) as error:
            client.generate("a red circle")
    assert error.value.code == "UNAVAILABLE"


def test_a_cut_prompt_warns(client):
    with pytest.warns(UserWarning, match="was cut to 16"):
        client.generate("very " * 30 + "red circle")


def test_the_command_writes_pictures_and_prints_seeds_and_paths(server, tmp_path):
    done = run(server, "A red circle!", "-n", "3", "--seed", "7", "--steps", "4", "--out",
               str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    for seed in (7, 8, 9):
        path = tmp_path / f"a-red-circle-{seed}.png"
        assert Image.open(path).size == (32, 32)
        assert f"{path}  seed {seed}" in done.stdout
    assert "3 image(s) in " in done.stdout


def test_the_command_says_plainly_what_is_wrong(server, tmp_path):
    done = run(server, "a red circle", "--steps", "0", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "steps=0 is invalid: must be between 1 and 50" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


def test_the_command_without_a_server_says_so(tmp_path):
    command = [COMMAND, "generate", "x", "--server", "127.0.0.1:1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "127.0.0.1:1" in done.stdout


def test_the_command_stops_the_work_after_its_timeout(server, tmp_path):
    with work_stops(server):
        done = run(server, "a red circle", "-n", "16", "--steps", "50", "--width", "128",
                   "--height", "128", "--timeout", "1", "--out", str(tmp_path))  # fmt: skip
    assert done.returncode == 1
    assert "not finished after the 1 s of --timeout" in done.stdout


def test_ctrl_c_stops_the_work_on_the_server(server, tmp_path):
    command = [COMMAND, "generate", "a red circle", "-n", "16", "--steps", "50", "--width", "128",
               "--height", "128", "--out", str(tmp_path), "--server", server.address]  # fmt: skip
    with work_stops(server) as before:
        with heard(signal.SIGINT):  # processes in the background ignore it
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        wait_for_a_call(server, before)
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "the server has stopped working on it" in output
