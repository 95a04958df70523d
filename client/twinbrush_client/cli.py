"""The command line: `twinbrush generate "a large red circle"`."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any
from unicodedata import category

import typer
from rich.console import Console

from twinbrush_client.client import Client
from twinbrush_client.connection import DEFAULT_ADDRESS, TIMEOUT
from twinbrush_client.errors import (
    DeadlineExceeded,
    ServerUnavailable,
    TwinbrushError,
    invalid,
)
from twinbrush_client.options import with_field_options
from twinbrush_client.output import Output, format_of, grid, refuse_existing
from twinbrush_client.painting import Display, Job, events
from twinbrush_client.story import fields_of, read_story
from twinbrush_client.wire import Picture

app = typer.Typer(no_args_is_help=True, add_completion=False)
INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended
STDIN = "-"
CONTROLS = ("Cc", "Cs")  # Unicode's categories of control characters and lone surrogates
Server = Annotated[str, typer.Option(envvar="TWINBRUSH_SERVER", help="Server's gRPC address.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def twinbrush() -> None:
    """Pictures from a Twinbrush server."""


@app.command()
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
    server: Server = DEFAULT_ADDRESS,
    **fields: Any,
) -> None:  # fmt: skip
    """Paints prompts and writes their pictures. Ctrl-C stops the work on the server too.

    Files are never overwritten without --overwrite: a name that is taken gets a number.
    """
    started = time.monotonic()
    console = _console(as_json)
    with _errors(console, timeout):
        if grid_file:
            refuse_existing("grid", grid_file, overwrite)
        fields["image_format"] = format_of(output, image_format)
        fields |= {"preview_every": 1 if preview else None, "timeout": timeout}
        jobs = _jobs(_texts(prompt, prompts), like, fields)
        files = Output(out, output, overwrite)
        with Client(server, timeout) as client:
            painted = _paint(client, jobs, files, Display(console, preview), console)
        if grid_file:
            grid([picture.image for _, picture, _ in painted]).save(grid_file)
            console.print(f"{grid_file}  grid", soft_wrap=True)
    for text in sorted({picture.warning for _, picture, _ in painted} - {""}):
        console.print(f"[yellow]warning:[/] {_escaped(text)}", soft_wrap=True)
    milliseconds = 1000 * (time.monotonic() - started)
    console.print(f"{len(painted)} image(s) in {milliseconds:.0f} ms")
    if as_json:
        rows = [
            {"path": str(path), "prompt": job.prompt, "seed": picture.seed,
             "warning": picture.warning}
            for job, picture, path in painted
        ]  # fmt: skip
        _print_json(rows)


@app.command()
def status(as_json: AsJson = False, server: Server = DEFAULT_ADDRESS) -> None:
    """Tells what a server serves; exits with 1 where none is ready."""
    console = _console(as_json)
    with _errors(console), Client(server, timeout=10, max_retries=0) as client:
        info = client.info()
    if as_json:
        _print_json(asdict(info))
        return
    defaults = ", ".join(f"{name} {info.defaults[name]}" for name in ("steps", "guidance_scale"))
    sizes = info.sizes
    console.print(f"ready: Twinbrush {info.version} at {server}")
    console.print(f"checkpoint: {_escaped(info.checkpoint)}")
    if info.device:
        console.print(f"device: {info.device}")
    console.print(f"samplers: {', '.join(info.samplers)} (default {info.defaults['sampler']})")
    if info.loras:
        console.print(f"loras: {', '.join(info.loras)}")
    console.print(f"defaults: {defaults}")
    console.print(f"sizes: {sizes['native']} pixels, up to {sizes['largest']}, "
                  f"multiples of {sizes['multiple_of']}")  # fmt: skip


@app.command()
def inspect(
    files: Annotated[list[Path], typer.Argument(help="Pictures.", metavar="FILE...")],
    as_json: AsJson = False,
) -> None:
    """Shows how pictures were made, from the files themselves; as JSON, a list where several."""
    console = _console(as_json)
    with _errors(console):
        stories = [read_story(file) for file in files]
    if as_json:
        _print_json(stories if len(files) > 1 else stories[0])
        return
    for file, story in zip(files, stories, strict=True):
        if len(files) > 1:
            console.print(f"\nfile: {_escaped(str(file))}", soft_wrap=True)
        for name, value in story.items():
            console.print(f"{_escaped(name)}: {_escaped(str(value))}", soft_wrap=True)


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
        text = "the server is not installed here: pip install 'twinbrush[server]'"
        _console(False).print(f"[red]{_escaped(text)}[/]", soft_wrap=True)
        raise typer.Exit(1)
    os.execv(sys.executable, [sys.executable, "-m", "twinbrush.server", *context.args])


def _console(as_json: bool) -> Console:
    """With JSON on standard output, all else goes to standard error."""
    return Console(highlight=False, stderr=as_json)


@contextmanager
def _errors(console: Console, timeout: float = TIMEOUT) -> Iterator[None]:
    """Errors become a line and an exit status."""
    try:
        yield
    except TwinbrushError as error:
        text = str(error)
        if isinstance(error, DeadlineExceeded):
            text = f"not finished after the {timeout:g} s of --timeout; the server ends its work"
        elif isinstance(error, ServerUnavailable):
            text += "; `twinbrush serve` starts a server"
        console.print(f"[red]{_escaped(text)}[/]", soft_wrap=True)
        raise typer.Exit(1) from None
    except OSError as error:
        text = f"cannot use {error.filename}: {error.strerror}"
        console.print(f"[red]{_escaped(text)}[/]", soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("cancelled; the server has stopped working on it")
        raise typer.Exit(INTERRUPTED) from None


def _texts(prompt: str | None, prompts: Path | None) -> list[str]:
    """The prompts of the arguments, of a file, or of standard input.

    Raises:
        InvalidRequest: both an argument and a file are given, or there is no prompt in them.
    """
    if prompt is not None and prompts is not None:
        raise invalid("--prompts", str(prompts), "cannot be combined with a prompt")
    source = str(prompts) if prompts is not None else prompt
    if source is None:
        return []
    if prompts is None and prompt != STDIN:
        return [source]
    text = sys.stdin.read() if source == STDIN else Path(source).read_text()
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
        taken = fields_of(read_story(like))
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


def _print_json(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    # Lone surrogates have no UTF-8; with a backslash they are JSON's escapes.
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode())


def _escaped(text: str) -> str:
    """Text of a file or a server for the console: as it is, without codes that steer terminals."""
    shown = "".join(ascii(c)[1:-1] if category(c) in CONTROLS and c not in "\n\t" else c
                    for c in text)  # fmt: skip
    return shown.replace("[", "\\[")
