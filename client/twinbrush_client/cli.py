"""The command line: `twinbrush generate "a large red circle"`."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any
from unicodedata import category

import typer
from rich.console import Console

from twinbrush_client.client import Client
from twinbrush_client.connection import TIMEOUT
from twinbrush_client.errors import (
    DeadlineExceeded,
    NothingListens,
    TwinbrushError,
    invalid,
)
from twinbrush_client.options import Command, Group, Way, with_field_options, with_server_options
from twinbrush_client.output import Output, format_of, grid, new_file
from twinbrush_client.painting import Display, Job, events
from twinbrush_client.story import fields_of, read_story
from twinbrush_client.wire import Picture, ServerInfo

app = typer.Typer(cls=Group, no_args_is_help=True, add_completion=False)
INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended
STDIN = "-"
CONTROLS = ("Cc", "Cs")  # Unicode's categories of control characters and lone surrogates
ERROR, WARNING = "red", "yellow"
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            print(version("twinbrush-client"))
        except PackageNotFoundError:  # a source tree that is not installed
            print("unknown")
        raise typer.Exit


@app.callback()
def twinbrush(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True,
                           help="Print the version.")
    ] = False,
) -> None:  # fmt: skip
    """Pictures from a Twinbrush server."""
    for stream in (sys.stdout, sys.stderr):  # names of files need not be text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@app.command(cls=Command)
@with_server_options
@with_field_options
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What to paint; - reads prompts from standard input.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File with a prompt a line; - is standard input.")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="Picture whose prompt and settings to take; options win.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File of the picture; its suffix is the "
                                  "format. Several pictures get their seeds added.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("output"),
    image_format: Annotated[
        str | None, typer.Option("--format", help="png, jpeg, webp or avif.")
    ] = None,
    grid_file: Annotated[
        Path | None, typer.Option("--grid", help="Also write all pictures side by side to a file.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that exist.")
    ] = False,
    preview: Annotated[
        bool, typer.Option("--preview", help="Show previews in the terminal while painting.")
    ] = False,
    as_json: AsJson = False,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that everything may take; then it is cancelled.")
    ] = TIMEOUT,
    *,
    way: Way,
    **fields: Any,
) -> None:  # fmt: skip
    """Paints prompts and writes their pictures. Ctrl-C stops the work on the server too.

    Files are never overwritten without --overwrite: a name that is taken gets a number.
    """
    started = time.monotonic()
    console = _console(as_json)
    with _errors(timeout):
        if grid_file:
            format_of("grid", grid_file)
            new_file("grid", grid_file, overwrite)
            if output and output.resolve() == grid_file.resolve():
                raise invalid("--grid", str(grid_file), "is the file of --output")
        fields["image_format"] = format_of("output", output, image_format)
        fields |= {"preview_every": 1 if preview else None, "timeout": timeout}
        jobs = _jobs(_texts(prompt, prompts), like, fields)
        files = Output(out, output, overwrite)
        with way.client(timeout) as client:
            painted = _paint(client, jobs, files, Display(console, preview), console)
        if grid_file:
            sheet = grid([picture.image for _, picture, _ in painted])
            console.print(f"{files.write_grid(sheet, grid_file)}  grid", soft_wrap=True)
        for text in sorted({picture.warning for _, picture, _ in painted} - {""}):
            console.print(f"warning: {_shown(text)}", style=WARNING, soft_wrap=True)
        milliseconds = 1000 * (time.monotonic() - started)
        console.print(f"{len(painted)} image(s) in {milliseconds:.0f} ms")
        if as_json:
            _print_json([
                {"path": str(path), "prompt": job.prompt, "seed": picture.seed,
                 "warning": picture.warning}
                for job, picture, path in painted
            ])  # fmt: skip


@app.command(cls=Command)
@with_server_options
def status(as_json: AsJson = False, *, way: Way) -> None:
    """Tells what a server serves; exits with 1 where none is ready."""
    with _errors():
        with way.client(timeout=10, max_retries=0) as client:
            info = client.info()
        if as_json:
            _print_json(asdict(info))
        else:
            _print_status(info, way.server)


def _print_status(info: ServerInfo, server: str) -> None:
    defaults = ", ".join(f"{name} {info.defaults[name]}" for name in ("steps", "guidance_scale"))
    sizes = info.sizes
    lines = [
        f"ready: Twinbrush {info.version} at {server}",
        f"checkpoint: {info.checkpoint}",
        info.device and f"device: {info.device}",
        f"samplers: {', '.join(info.samplers)} (default {info.defaults['sampler']})",
        info.loras and f"loras: {', '.join(info.loras)}",
        f"defaults: {defaults}",
        f"sizes: {sizes['native']} pixels, up to {sizes['largest']}, "
        f"multiples of {sizes['multiple_of']}",
    ]
    for line in filter(None, lines):
        _console().print(_shown(line), soft_wrap=True)


@app.command(cls=Command)
def inspect(
    files: Annotated[list[Path], typer.Argument(help="Pictures.", metavar="FILE...")],
    as_json: AsJson = False,
) -> None:
    """Shows how pictures were made, from the files themselves; as JSON, a list where several."""
    with _errors():
        stories = [read_story(file) for file in files]
        if as_json:
            _print_json(stories if len(files) > 1 else stories[0])
            return
        for file, story in zip(files, stories, strict=True):
            if len(files) > 1:
                _console().print(f"\nfile: {_shown(str(file))}", soft_wrap=True)
            for name, value in story.items():
                _console().print(_shown(f"{name}: {value}"), soft_wrap=True)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve(context: typer.Context) -> None:
    """Starts a server where it is installed; takes the options of python -m twinbrush.server."""
    try:
        found = importlib.util.find_spec("twinbrush.server")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise _failed("the server is not installed here: pip install 'twinbrush[server]'")
    os.execv(sys.executable, [sys.executable, "-m", "twinbrush.server", *context.args])


def _console(stderr: bool = False) -> Console:
    """Prints text as it is. With JSON on standard output, all else goes to standard error."""
    return Console(highlight=False, markup=False, emoji=False, stderr=stderr)


def _shown(text: str) -> str:
    """Text of a file or a server for the console: as it is, without codes that steer terminals."""
    return "".join(ascii(c)[1:-1] if category(c) in CONTROLS and c not in "\n\t" else c
                   for c in text)  # fmt: skip


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")
    sys.stdout.flush()


def _failed(text: str, status: int = 1) -> typer.Exit:
    _console(stderr=True).print(_shown(text), style=ERROR, soft_wrap=True)
    return typer.Exit(status)


@contextmanager
def _errors(timeout: float = TIMEOUT) -> Iterator[None]:
    """Errors become a line on standard error, and an exit status."""
    try:
        yield
    except TwinbrushError as error:
        text = str(error)
        if isinstance(error, DeadlineExceeded) and "deadline_ms" not in text:
            text = f"not finished after the {timeout:g} s of --timeout; the server ends its work"
        elif isinstance(error, NothingListens):
            text += "; `twinbrush serve` starts a server"
        raise _failed(text) from None
    except BrokenPipeError:  # who reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except OSError as error:
        raise _failed(f"cannot use {error.filename or 'the output'}: {error.strerror}") from None
    except KeyboardInterrupt:
        raise _failed("cancelled; the server has stopped working on it", INTERRUPTED) from None


def _texts(prompt: str | None, prompts: Path | None) -> list[str]:
    """The prompts of the arguments, of a file, or of standard input.

    Raises:
        InvalidRequest: both an argument and a file are given, or they hold no prompt, or no text.
    """
    if prompt is not None and prompts is not None:
        raise invalid("--prompts", str(prompts), "cannot be combined with a prompt")
    source = str(prompts) if prompts is not None else prompt
    if source is None:
        return []
    if prompts is None and prompt != STDIN:
        return [source]
    if source == STDIN and sys.stdin is None:
        raise invalid("--prompts", source, "needs standard input, which is closed")
    data = sys.stdin.buffer.read() if source == STDIN else Path(source).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise invalid("--prompts", source, "must be text in UTF-8") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise invalid("--prompts", source, "has no prompt")
    return lines


def _jobs(texts: list[str], like: Path | None, fields: dict[str, Any]) -> list[Job]:
    """A job for each prompt; with a seed, the pictures of all of them count up from it.

    Raises:
        InvalidRequest: there is no prompt, or `like` cannot be repeated.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if like is not None:
        taken = fields_of(read_story(like), str(like))
        prompt = taken.pop("prompt")
        given, texts = taken | given, texts or [prompt]
    if not texts:
        raise invalid("PROMPT", None, "must be given, or --prompts or --like")
    jobs = [Job(number, text, dict(given)) for number, text in enumerate(texts)]
    if "seed" in given:
        for job in jobs:
            job.fields["seed"] += job.number * given.get("num_images", 1)
    return jobs


def _paint(
    client: Client, jobs: list[Job], files: Output, display: Display, console: Console
) -> list[tuple[Job, Picture, Path]]:
    """Writes each picture when it is there; returns them by prompt and seed."""
    painted = []
    several = len(jobs) > 1 or jobs[0].fields.get("num_images", 1) > 1
    with display:
        for job, event in events(client, jobs):
            display.show(job, event)
            if isinstance(event, Picture):
                name = job.fields.get("image_format", "png")
                path = files.write(event.data, job.prompt, event.seed, name, several)
                console.print(f"{path}  seed {event.seed}", soft_wrap=True)
                painted.append((job, event, path))
    return sorted(painted, key=lambda row: (row[0].number, row[1].index))
