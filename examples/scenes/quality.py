"""`python -m examples.scenes.quality`: paints held-out prompts, reads them back, and counts.

Every prompt is of a scene with a combination of shape, colour and size that training never
showed (one name in five leaves the size out); with `--seen`, without. Pictures come from the
serving engine, in this process. First the reader reads true pictures of the same scenes: what
it scores there is the most that any model can reach.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import compress, pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.local_engine import local_engine
from benchmarks.machine import write_result
from examples.scenes.reader import Reading, read
from examples.scenes.scenes import (
    SIDE,
    Item,
    Scene,
    describe,
    middle_item,
    relation,
    render,
    sample_row,
    sample_scene,
    says_between,
    spelled_out,
)
from export.painting import paint
from twinbrush.engine.engine import Engine
from twinbrush.engine.request import InvalidArgument
from twinbrush.runtimes.onnx_runtime import LocalModels

SEED = 90_000_000  # of the held-out scenes; picture k is painted from seed k
BETWEEN_SEED = 91_000_000
NAMES = {1: "one_object", 2: "two_objects", 3: "three_objects"}
console = Console()


@dataclass(frozen=True)
class Task:
    """A prompt, and the scene that it is true of."""

    prompt: str
    scene: Scene


@dataclass(frozen=True)
class Score:
    """What of a prompt a picture shows; None where the prompt does not say.

    Attributes:
        painted: there is any object; in a black picture, which NaN would be too, is none.
        count: as many objects as named.
        shape, colour: the multiset of each is right.
        size: every object whose size is named is there, in it.
        colour_binding: every named shape is there in its colour; of several objects only.
        relation: every named relation holds.
        background: it has the named colour.
    """

    painted: bool
    count: bool
    shape: bool
    colour: bool
    size: bool | None
    colour_binding: bool | None
    relation: bool | None
    background: bool | None

    @property
    def all_correct(self) -> bool:
        return False not in asdict(self).values()


def tasks(n: int, held_out: bool = True) -> list[Task]:
    """Prompts, as many of one object as of two and of three."""
    made = []
    for k in range(n):
        rng = np.random.default_rng(SEED + k)
        scene = sample_scene(rng, 1 + k % 3, held_out)
        made.append(Task(describe(scene, rng), scene))
    return made


def between_tasks(n: int) -> list[Task]:
    """Prompts that say of one object that it is between two others; none is held out."""
    made = []
    while len(made) < n:
        rng = np.random.default_rng(BETWEEN_SEED + len(made))
        scene = sample_row(rng)
        while not says_between(prompt := describe(scene, rng)):
            pass
        made.append(Task(prompt, scene))
    return made


def score(task: Task, reading: Reading) -> Score:
    """Compares a picture with what its prompt says."""
    wanted, shown = task.scene.items, reading.items
    placed = {(item.shape, item.colour): item for item in shown}
    sized = [item for item in wanted if f"{item.size} {item.colour} {item.shape}" in task.prompt]
    bound = all((item.shape, item.colour) in placed for item in wanted)
    return Score(
        painted=bool(shown),
        count=len(shown) == len(wanted),
        shape=_same(wanted, shown, "shape"),
        colour=_same(wanted, shown, "colour"),
        size=all(_has_size(item, placed) for item in sized) if sized else None,
        colour_binding=bound if len(wanted) > 1 else None,
        relation=_related(task, placed) if len(wanted) > 1 else None,
        background=reading.background == task.scene.background
        if task.scene.background in task.prompt
        else None,
    )


def _same(wanted: Iterable[Item], shown: Iterable[Item], attribute: str) -> bool:
    a, b = (sorted(getattr(item, attribute) for item in items) for items in (wanted, shown))
    return a == b


def _has_size(item: Item, placed: dict[tuple[str, str], Item]) -> bool:
    found = placed.get((item.shape, item.colour))
    return found is not None and found.size == item.size


def _related(task: Task, placed: dict[tuple[str, str], Item]) -> bool:
    """Whether named relations hold: centres in the named order along the named axis.

    "Between" names none: it is asked for on the axis on which the outer two stand further apart.
    """
    wanted = task.scene.items
    shown = [
        placed[item.shape, item.colour] for item in wanted if (item.shape, item.colour) in placed
    ]
    if len(shown) < len(wanted):
        return False
    if says_between(task.prompt):
        middle = middle_item(task.scene)
        assert middle is not None, "describe says between only where it is so"
        inner = shown.pop(middle)
        a, b = shown
        axis = "x" if abs(a.x - b.x) > abs(a.y - b.y) else "y"
        low, high = sorted(getattr(item, axis) for item in shown)
        return low < getattr(inner, axis) < high
    for (a, b), (shown_a, shown_b) in zip(pairwise(wanted), pairwise(shown), strict=True):
        axis = "x" if relation(a, b) in ("left of", "right of") else "y"
        true = getattr(a, axis) < getattr(b, axis)
        if (getattr(shown_a, axis) < getattr(shown_b, axis)) != true:
            return False
    return True


@contextmanager
def scene_engine(repository: Path) -> Iterator[Engine]:
    """The serving engine over a repository; ends the command where its pictures are no scenes'."""
    with local_engine(repository, LocalModels(repository)) as engine:
        if (side := engine.config.native_side) != SIDE:
            sys.exit(f"error: --repository: its pictures have {side} pixels a side, not {SIDE}")
        yield engine


def interval(hits: int, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a share, in percent."""
    z, p = 1.96, hits / n
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + side * half) / (1 + z * z / n) for side in (-1, 1))
    return round(100 * max(0.0, float(low)), 1), round(100 * float(high), 1)


def share(values: Iterable[bool | None]) -> dict[str, object] | None:
    """Percent true of those that are not None, with its interval."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    percent = round(100 * sum(known) / len(known), 1)
    return {"percent": percent, "interval": interval(sum(known), len(known)), "n": len(known)}


def table_of(all_tasks: list[Task], scores: list[Score]) -> dict[str, dict[str, Any]]:
    """Attribute by attribute, by number of objects and over all."""
    rows: dict[str, list[Score]] = {name: [] for name in (*NAMES.values(), "all")}
    for task, found in zip(all_tasks, scores, strict=True):
        rows[NAMES[len(task.scene.items)]].append(found)
        rows["all"].append(found)
    return {name: row_of(scored) for name, scored in rows.items()}


def row_of(scores: list[Score]) -> dict[str, Any]:
    attributes = ("all_correct", *Score.__dataclass_fields__)
    return {a: share(getattr(found, a) for found in scores) for a in attributes}


def measure(engine: Engine, all_tasks: list[Task], **fields: str | float) -> list[Score]:
    """Paints the prompts, reads the pictures, and scores them.

    `fields` are request fields that are not the checkpoint's defaults.
    """
    wire = {
        name: np.array([value.encode()], object) if isinstance(value, str) else np.array([value])
        for name, value in fields.items()
    }
    pictures = paint(engine, [task.prompt for task in all_tasks], **wire)
    return [score(task, read(p)) for task, p in zip(all_tasks, pictures, strict=True)]


def reader_accuracy(all_tasks: list[Task]) -> float:
    """Percent of true pictures that are read back as what they are."""
    right = [score(task, read(render(task.scene))).all_correct for task in all_tasks]
    return round(100 * sum(right) / len(right), 2)


def main(
    repository: Annotated[Path, typer.Option(help="Exported model repository.")] = Path(
        "model_repository"
    ),
    n: Annotated[int, typer.Option(min=3, help="Prompts.")] = 1000,
    seen: Annotated[
        bool, typer.Option("--seen", help="Only combinations that training shows.")
    ] = False,
    between: Annotated[
        bool, typer.Option("--between", help="Only prompts that say it; of seen combinations.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Denoising steps; 0 is the checkpoint's.")] = 0,
    sampler: Annotated[str, typer.Option(help="Empty is the checkpoint's.")] = "",
    guidance: Annotated[float, typer.Option(help="Scale; negative is the checkpoint's.")] = -1,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path(
        "examples/scenes/results/quality.json"
    ),
) -> None:
    """Counts how well pictures follow their prompts."""
    all_tasks = between_tasks(n) if between else tasks(n, held_out=not seen)
    ceiling = reader_accuracy(all_tasks)
    console.print(f"reader: {ceiling}% of {n} true pictures read right")
    given: dict[str, str | float] = {"steps": steps} if steps else {}
    if sampler:
        given["sampler"] = sampler
    if guidance >= 0:
        given["guidance_scale"] = guidance
    with scene_engine(repository) as engine:
        try:
            scores = measure(engine, all_tasks, **given)
        except InvalidArgument as error:
            sys.exit(f"error: {error}")
        request = asdict(engine.config.defaults) | given
        checkpoint = engine.config.checkpoint
    table = table_of(all_tasks, scores)
    left_open = (
        spelled_out(task.scene, task.prompt) != task.prompt and not says_between(task.prompt)
        for task in all_tasks
    )
    table["same_side"] = row_of([*compress(scores, left_open)])
    summary: dict[str, object] = {"reader_accuracy": ceiling}
    for name in NAMES.values():
        summary[name] = _percent(table[name]["all_correct"])
    summary |= {key: _percent(table["all"][key]) for key in ("relation", "colour_binding")}
    summary |= {"steps": request["steps"], "n": n}
    write_result(
        out,
        "python -m examples.scenes.quality",
        checkpoint=checkpoint,
        prompts="between" if between else "seen" if seen else "held out",
        request=request,
        summary=summary,
        table=table,
    )
    _show(table)
    print(json.dumps(summary))


def _percent(cell: object) -> object:
    return cell["percent"] if isinstance(cell, dict) else None


def _show(table: dict[str, dict[str, object]]) -> None:
    shown = Table(title="percent right, with 95% intervals", title_justify="left")
    shown.add_column("")
    for name in table:
        shown.add_column(name.replace("_", " "))
    for attribute in table["all"]:
        cells = []
        for row in table.values():
            cell = row[attribute]
            cells.append(
                f"{cell['percent']}  {cell['interval'][0]}–{cell['interval'][1]}"
                if isinstance(cell, dict)
                else ""
            )
        shown.add_row(attribute.replace("_", " "), *cells)
    console.print(shown)


if __name__ == "__main__":
    typer.run(main)
