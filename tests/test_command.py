"""The command line `twinbrush`, against the real server."""

from __future__ import annotations

import base64
import contextlib
import errno
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from harness import heard
from PIL import ExifTags, Image
from test_wire import wait_for_a_call, work_stops
from typer.testing import CliRunner

from twinbrush_client import Client, InvalidRequest, terminal
from twinbrush_client.cli import _errors, app
from twinbrush_client.fields import DATA_TYPES, STREAM_ONLY
from twinbrush_client.output import Output
from twinbrush_client.story import fields_of, read_story

COMMAND = str(Path(sys.executable).parent / "twinbrush")


@pytest.fixture
def client(server):
    with Client(server.address) as client:
        yield client


def run(server, *arguments):
    command = [COMMAND, "generate", *arguments, "--server", server.address]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


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
    assert done.stderr.startswith("steps=0 is invalid: must be between 1 and 50")
    assert not done.stdout
    assert not list(tmp_path.iterdir())
    late = run(server, "a red circle", "--deadline-ms", "1", "--out", str(tmp_path))
    assert late.stderr.startswith("deadline_ms")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--steps 4.5", "'--steps': '4.5' must be an integer, 1 to 50"),
        ("--seed 1e3", "'--seed': '1e3' must be an integer, 0 to"),
        ("-g high", "'--guidance-scale': 'high' must be a number, 0 to 50"),
        ("-n two", "'--num-images': 'two' must be an integer, 1 to 16"),
        ("--crop-top-left 0 x", "'--crop-top-left': 'x' must be an integer, two of 0 to 1048576"),
        ("--timeout soon", "'--timeout': 'soon' must be a number"),
        ("--timeout 0", "'--timeout': '0' must be greater than or equal to 0.1"),
    ],
)
def test_an_option_of_the_wrong_type_is_told_its_value_and_what_is_allowed(options, words):
    done = CliRunner().invoke(app, ["generate", "x", *options.split()], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert words in done.output


def test_the_command_without_a_server_says_so(tmp_path):
    command = [COMMAND, "generate", "x", "--server", "127.0.0.1:1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "127.0.0.1:1" in done.stderr


def test_the_command_stops_the_work_after_its_timeout(server, tmp_path):
    with work_stops(server):
        done = run(server, "a red circle", "-n", "16", "--steps", "50", "--width", "128",
                   "--height", "128", "--timeout", "1", "--out", str(tmp_path))  # fmt: skip
    assert done.returncode == 1
    assert "not finished after the 1 s of --timeout" in done.stderr


def test_ctrl_c_stops_the_work_on_the_server(server, tmp_path):
    command = [COMMAND, "generate", "a red circle", "-n", "16", "--steps", "50", "--width", "128",
               "--height", "128", "--out", str(tmp_path), "--server", server.address]  # fmt: skip
    with work_stops(server) as before:
        with heard(signal.SIGINT):  # processes in the background ignore it
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        wait_for_a_call(server, before)
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "the server has stopped working on it" in output


def test_every_field_is_an_option_of_the_command(server):
    done = subprocess.run([COMMAND, "generate", "--help"], capture_output=True, text=True,
                          env=os.environ | {"COLUMNS": "200"}, timeout=60)  # fmt: skip
    for name in {*DATA_TYPES} - {"prompt", "image_format", *STREAM_ONLY}:
        assert f"--{name.replace('_', '-')} " in done.stdout, name


def test_names_that_are_taken_get_a_number(server, tmp_path):
    for _ in range(2):
        assert run(server, "a ring", "--seed", "7", "--out", str(tmp_path)).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a-ring-7.png", "a-ring-7-2.png"}


def test_a_file_of_its_own_name_is_never_overwritten_silently(server, tmp_path):
    file = tmp_path / "mine.webp"
    assert run(server, "a ring", "-o", str(file), "--seed", "7").returncode == 0
    before = file.read_bytes()
    assert Image.open(file).format == "WEBP"
    done = run(server, "a ring", "-o", str(file), "--seed", "8")
    assert done.returncode == 1
    assert "exists; --overwrite replaces it" in done.stderr
    assert file.read_bytes() == before
    assert run(server, "a ring", "-o", str(file), "--seed", "8", "--overwrite").returncode == 0
    assert file.read_bytes() != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a ring", "-o", "x.gif"], "must end in one of png, jpeg"),
        (["a ring", "-o", "x.png", "--format", "jpeg"], "must be png, as the suffix"),
        (["a ring", "--prompts", "x"], "cannot be combined with a prompt"),
        ([], "PROMPT=None is invalid: must be given"),
        (["--like", "/dev/null"], "is no picture"),
        (["--prompts", "/no/such/file"], "cannot use /no/such/file: No such file"),
        (["--prompts", sys.executable], "must be text in UTF-8"),
        (["a ring", "-o", "x.png", "--grid", "./x.png"], "is the file of --output"),
        (["a ring", "--grid", "x.gif"], "--grid='x.gif' is invalid: must end in one of png"),
        (["a ring", "-o", "/dev/null/x.png"], "cannot use /dev/null: Not a directory"),
    ],
)
def test_options_that_do_not_fit_are_named(server, options, message, tmp_path):
    done = run(server, *options, "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_bytes_of_the_server_are_written_and_the_file_tells_how_to_repeat_it(
    server, client, tmp_path
):
    file, again = tmp_path / "a.png", tmp_path / "b.png"
    settings = ["--steps", "3", "-n", "1", "--deterministic", "--negative-prompt", "blur"]
    assert run(server, "a ring", "-o", str(file), "--seed", "7", *settings).returncode == 0
    events = list(client.stream("a ring", seed=7, steps=3, deterministic=True,
                                negative_prompt="blur"))  # fmt: skip
    assert file.read_bytes() == events[-1].data
    assert run(server, "--like", str(file), "-o", str(again)).returncode == 0
    assert again.read_bytes() == file.read_bytes()
    shown = subprocess.run([COMMAND, "inspect", str(file)], capture_output=True, text=True)
    assert "prompt: a ring\nnegative_prompt: blur\nseed: 7\nsteps: 3\n" in shown.stdout
    assert "Steps: 3, Sampler: " in Image.open(file).text["parameters"]


def test_a_picture_without_metadata_says_so(server, tmp_path):
    file = tmp_path / "a.jpeg"
    assert run(server, "a ring", "-o", str(file), "--no-metadata").returncode == 0
    shown = subprocess.run([COMMAND, "inspect", str(file)], capture_output=True, text=True)
    assert shown.returncode == 1
    assert "says nothing of how it was made" in shown.stderr
    assert not shown.stdout


@pytest.mark.parametrize("name", ["png", "jpeg", "webp", "avif"])
def test_every_format_can_be_inspected(client, tmp_path, name):
    events = list(client.stream("a ring, élan", seed=7, image_format=name))
    file = tmp_path / "picture"
    file.write_bytes(events[-1].data)
    shown = subprocess.run([COMMAND, "inspect", str(file), "--json"], capture_output=True)
    story = json.loads(shown.stdout)
    assert (story["prompt"], story["seed"]) == ("a ring, élan", 7)


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_painted(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(PermissionError):
        Output(tmp_path, None, overwrite=False)
    with pytest.raises(PermissionError):
        Output(tmp_path, tmp_path / "a.png", overwrite=False)


def test_a_folder_is_no_file_to_overwrite(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(InvalidRequest, match="is a folder"):
        Output(tmp_path, tmp_path / "a.png", overwrite=True)


def test_a_damaged_file_is_named_and_nothing_else(client, tmp_path):
    random = np.random.default_rng(0)
    file = tmp_path / "damaged"
    for name in ("png", "jpeg", "webp", "avif"):
        *_, picture = client.stream("a ring", seed=7, image_format=name)
        for _ in range(60):
            data = bytearray(picture.data)
            for place in random.integers(0, min(len(data), 600), 4):
                data[place] = random.integers(0, 256)
            file.write_bytes(data[: random.integers(1, len(data))])
            with contextlib.suppress(InvalidRequest):
                fields_of(read_story(file))


def test_a_story_with_values_of_other_types_is_refused():
    story = {"prompt": "a ring", "seed": 7, "checkpoint": "tiny"}
    assert fields_of(story) == {"prompt": "a ring", "seed": 7}
    with pytest.raises(InvalidRequest, match="seed='7' is invalid"):
        fields_of(story | {"seed": "7"})
    with pytest.raises(InvalidRequest, match="'a' is invalid: was not made by Twinbrush"):
        fields_of(story | {"prompt": ["a ring"]}, "a")


@pytest.mark.parametrize(
    ("code", "encoding"),
    [("UNICODE\0", "utf-16-be"), ("UNICODE\0", "utf-16-le"), ("ASCII\0\0\0", "ascii")],
)
def test_a_jpeg_of_another_tool_tells_its_settings(code, encoding, tmp_path):
    text = ("a ring" if encoding == "ascii" else "一 ring") + "\nSteps: 20, Sampler: Euler a"
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = code.encode() + text.encode(
        encoding
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    assert read_story(tmp_path / "a.jpg") == {"parameters": text}


def test_an_output_that_is_full_is_named_in_words(capsys):
    with pytest.raises(typer.Exit), _errors():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert capsys.readouterr().err == "cannot use the output: No space left on device\n"


@pytest.mark.parametrize("name", [b"a [red] :cat: \\[.png", b"\xff\n.png"], ids=["marks", "bytes"])
def test_names_of_files_are_printed_as_they_are(server, tmp_path, name):
    file = os.fsencode(tmp_path) + b"/" + name
    command = [COMMAND, "generate", "a [red] ring :cat:", "-o", file, "--server", server.address]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert os.path.exists(file)
    assert name.replace(b"\xff", b"\\udcff") in done.stdout
    shown = subprocess.run([COMMAND, "inspect", file], capture_output=True, timeout=60)
    assert b"prompt: a [red] ring :cat:\n" in shown.stdout


def test_who_reads_the_output_may_leave(server):
    command = f"{COMMAND} status --json --server {server.address}"
    line = f"{{ sleep 1; {command}; echo exit $? >&2; }} | true"  # the reader has gone before
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.stderr == "exit 1\n"


def test_prompts_come_from_standard_input_and_results_as_json(server, tmp_path):
    sheet = tmp_path / "sheet.png"
    command = [COMMAND, "generate", "-", "-n", "2", "--seed", "5", "--json", "--grid", str(sheet),
               "--format", "jpeg", "--out", str(tmp_path), "--server", server.address]  # fmt: skip
    done = subprocess.run(command, input="one\n\n two rings \nthree\n", capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        ("one", 5), ("one", 6), ("two rings", 7), ("two rings", 8), ("three", 9), ("three", 10),
    ]  # fmt: skip
    assert all(Image.open(row["path"]).format == "JPEG" for row in rows)
    assert Image.open(sheet).size == (3 * 32, 2 * 32)


def test_status_tells_what_is_served(server):
    done = subprocess.run([COMMAND, "status", "--server", server.address], capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0
    assert "sizes: 32 pixels, up to 128, multiples of 8" in done.stdout
    gone = subprocess.run([COMMAND, "status", "--server", "127.0.0.1:1"], capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert gone.returncode == 1
    assert "no server answers at 127.0.0.1:1" in gone.stderr


def test_serve_is_the_launcher():
    done = subprocess.run([COMMAND, "serve", "--help"], capture_output=True, text=True, timeout=60)
    assert "python -m twinbrush.server" in done.stdout


@pytest.mark.parametrize(
    ("environment", "sign"), [({}, "▀"), ({"KITTY_WINDOW_ID": "1"}, "\x1b_Ga=T,f=100")]
)
def test_previews_appear_in_the_terminal(server, tmp_path, environment, sign):
    main, worker = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"} | environment
    command = [COMMAND, "generate", "a ring", "--preview", "--steps", "20", "--out", str(tmp_path),
               "--server", server.address]  # fmt: skip
    process = subprocess.Popen(command, stdout=worker, stderr=worker, env=environment)
    os.close(worker)
    output = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while data := os.read(main, 65536):
            output += data
    os.close(main)
    assert process.wait(60) == 0
    assert sign in output.decode()


SMALL = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))


def test_kitty_and_iterm_get_the_picture_as_png():
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    messages = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", terminal.kitty(large))
    assert [control[-3:] for control, _ in messages] == ["m=1"] * (len(messages) - 1) + ["m=0"]
    assert max(len(data) for _, data in messages) <= 4096
    data = base64.b64decode("".join(data for _, data in messages))
    assert Image.open(io.BytesIO(data)).tobytes() == large.tobytes()
    data = base64.b64decode(terminal.iterm(SMALL).partition(":")[2].rstrip("\x07"))
    assert Image.open(io.BytesIO(data)).tobytes() == SMALL.tobytes()


def decoded_sixel(text: str) -> np.ndarray:
    """A picture (H, W, 3) of percent, by the rules of DEC's manual for what is used here."""
    width, height = map(int, re.match(r'\x1bPq"1;1;(\d+);(\d+)', text).groups())
    picture = np.full((height + 6, width, 3), -1)
    palette = {int(i): tuple(map(int, rgb.split(";")))
               for i, rgb in re.findall(r"#(\d+);2;(\d+;\d+;\d+)", text)}  # fmt: skip
    body = re.sub(r'^\x1bPq"[\d;]*(#\d+;2;[\d;]+?(?=#))*', "", text).removesuffix("\x1b\\")
    for band, lines in enumerate(body.split("-")[:-1]):
        for line in lines.split("$"):
            index, data = re.fullmatch(r"(?:#\d+;2;\d+;\d+;\d+)*#(\d+)([?-~]+)", line).groups()
            for x, character in enumerate(data):
                for bit in range(6):
                    if (ord(character) - 63) >> bit & 1:
                        picture[6 * band + bit, x] = palette[int(index)]
    return picture[:height]


def test_sixel_paints_every_pixel_in_its_colour():
    blocks = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    picture = decoded_sixel(terminal.sixel(Image.fromarray(blocks)))
    assert picture.shape == (256, 256, 3)
    expected = np.kron(blocks // 255 * 100, np.ones((128, 128, 1), int))
    np.testing.assert_array_equal(picture, expected)


def test_half_blocks_are_two_pixels_each():
    text = terminal.half_blocks(SMALL)
    assert text.plain == ("▀" * 8 + "\n") * 5


@pytest.mark.parametrize(
    ("environment", "drawn_by"),
    [
        ({"TERM": "xterm-kitty"}, terminal.kitty),
        ({"TERM_PROGRAM": "iTerm.app"}, terminal.iterm),
        ({"LC_TERMINAL": "iTerm2"}, terminal.iterm),
        ({"TERM": "foot"}, terminal.sixel),
        ({"TERM": "xterm-256color"}, None),
    ],
)
def test_terminals_are_known_by_their_environment(environment, drawn_by):
    assert terminal.protocol(environment) is drawn_by
