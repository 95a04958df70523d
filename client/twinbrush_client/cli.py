"""The command line: `twinbrush generate "a large red circle"`."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from twinbrush_client.client import Client, Stream
from twinbrush_client.connection import TIMEOUT
from twinbrush_client.errors import TwinbrushError
from twinbrush_client.wire import Picture

app = typer.Typer(no_args_is_help=True, add_completion=False)
console = Console(highlight=False)
INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended


@app.callback()
def twinbrush() -> None:
    """Pictures from a Twinbrush server."""


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to paint.")],
    num_images: Annotated[int, typer.Option("-n", "--num-images", help="How many.")] = 1,
    seed: Annotated[
        int | None, typer.Option(help="Of the first image; the others count up. Random if absent.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("-g", "--guidance-scale", help="How closely to follow.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to lead away from.")] = None,
    sampler: Annotated[str | None, typer.Option(help="lcm, ddim, euler or dpmpp_2m.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Same bytes however busy the server is.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that everything may take; then it is cancelled.")
    ] = TIMEOUT,
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("output"),
    server: Annotated[
        str, typer.Option(envvar="TWINBRUSH_SERVER", help="Server's gRPC address.")
    ] = "127.0.0.1:8001",
) -> None:
    """Paints a prompt and writes PNG files. Ctrl-C stops the work on the server too."""
    started = time.monotonic()
    try:
        out.mkdir(parents=True, exist_ok=True)
        client = Client(server, timeout)
        stream = client.stream(
            prompt, num_images=num_images, seed=seed, steps=steps, guidance_scale=guidance_scale,
            negative_prompt=negative_prompt, sampler=sampler, width=width, height=height,
            deterministic=deterministic,
        )  # fmt: skip
        with stream:
            pictures = _paint(stream, num_images, out / _slug(prompt))
    except TwinbrushError as error:
        text = str(error)
        if error.code == "DEADLINE_EXCEEDED":
            text = f"not finished after the {timeout:g} s of --timeout; the server ends its work"
        console.print(f"[red]{_escaped(text)}[/]", soft_wrap=True)
        raise typer.Exit(1) from None
    except OSError as error:
        console.print(f"[red]cannot write into {out}: {error.strerror}[/]", soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("cancelled; the server has stopped working on it")
        raise typer.Exit(INTERRUPTED) from None
    if pictures and pictures[0].warning:
        console.print(f"[yellow]warning:[/] {_escaped(pictures[0].warning)}", soft_wrap=True)
    milliseconds = 1000 * (time.monotonic() - started)
    console.print(f"{len(pictures)} image(s) in {milliseconds:.0f} ms")


def _paint(stream: Stream, num_images: int, stem: Path) -> list[Picture]:
    """Shows a bar over all steps of all images, and writes each image when it is there."""
    pictures: list[Picture] = []
    columns = (TextColumn("painting"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        for event in stream:
            if isinstance(event, Picture):
                path = stem.with_name(f"{stem.name}-{event.seed}.png")
                event.image.save(path)
                console.print(f"{path}  seed {event.seed}", soft_wrap=True)
                pictures.append(event)
            else:
                bar.update(task, total=num_images * event.total_steps, advance=1)
    return pictures


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-") or "image"


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")
