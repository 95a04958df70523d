"""Writes the copies of the tables of fields and metrics: `python -m twinbrush.engine.field_tables`.

Triton reads the front doors' inputs from `config.pbtxt`, the client stands alone, and the document
is for people: each keeps a copy, between two marks where the file has other contents too.
`tests/test_boundaries.py` compares them.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from twinbrush.engine.fields import Field, FromConfig
from twinbrush.engine.metrics import METRICS
from twinbrush.engine.request import COMMANDS, FIELDS

ROOT = Path(__file__).parents[2]
PBTXT_MARKS = ("# Inputs, written by `python -m twinbrush.engine.field_tables`.\n",
               "# End of inputs.\n")  # fmt: skip
METRIC_MARKS = ("<!-- metrics -->\n", "<!-- end of metrics -->\n")
DOCUMENT_MARKS = ("<!-- fields -->\n", "<!-- end of fields -->\n")
PYTHON_TYPES = {"STRING": "str", "BOOL": "bool", "INT32": "int", "INT64": "int", "FP32": "float"}


def unary_inputs() -> str:
    """The inputs of `text_to_image`."""
    return "".join(_input(f, optional=not f.required) for f in FIELDS.values() if not f.stream_only)


def stream_inputs() -> str:
    """The inputs of `text_to_image_stream`; a command comes without a prompt."""
    rows = (*FIELDS.values(), *COMMANDS.values())
    return "".join(_input(field, optional=True) for field in rows)


def _input(field: Field, optional: bool) -> str:
    tail = " optional: true" if optional else ""
    kind = f"data_type: TYPE_{field.data_type} dims: [ {field.count} ]"
    return f'input {{ name: "{field.name}" {kind}{tail} }}\n'


def markdown() -> str:
    """The table of `docs/requests.md`."""
    lines = ["| field | type | default | allowed | |", "|---|---|---|---|---|"]
    for field in (*FIELDS.values(), *COMMANDS.values()):
        door = "Stream only. " if field.stream_only else ""
        cells = (f"`{field.name}`", field.data_type.lower(), _default(field),
                 field.rule.allowed(), door + field.help)  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def metrics_markdown() -> str:
    """The table of `docs/metrics.md`."""
    lines = ["| metric | kind | labels | |", "|---|---|---|---|"]
    for metric in METRICS:
        labels = (
            f"`{name}`: {', '.join(f'`{value}`' for value in values) or 'the served models'}"
            for name, values in metric.labels.items()
        )
        lines.append(f"| `{metric.name}` | {metric.kind} | {'; '.join(labels)} | {metric.help}. |")
    return "\n".join(lines) + "\n"


def _default(field: Field) -> str:
    if field.required:
        return "required"
    if isinstance(field.default, FromConfig):
        return field.default.text
    empty = field.default is None or field.default == ""
    return "" if empty else f"`{str(field.default).lower()}`"


def client_module() -> str:
    """`twinbrush_client/fields.py`: data types, help, and the type of keyword arguments."""
    rows = FIELDS.values()
    return "\n".join([
        '"""The request fields of the server.',
        "",
        "Written by `python -m twinbrush.engine.field_tables`: do not edit.",
        '"""',
        "",
        "from __future__ import annotations",
        "",
        "from typing import TypedDict",
        "",
        "# Triton's data type of each field.",
        *_mapping("DATA_TYPES", ((f.name, f.data_type.replace("STRING", "BYTES")) for f in rows)),
        "",
        "HELP = {",
        *(_help_line(field) for field in rows),
        "}",
        "",
        *_mapping("ALLOWED", ((f.name, f.rule.allowed().replace("`", "")) for f in rows)),
        "",
        "# Elements of the fields that have several.",
        *_mapping("COUNTS", ((f.name, f.count) for f in rows if f.count > 1)),
        "",
        f"STREAM_ONLY = {tuple(f.name for f in rows if f.stream_only)!r}".replace("'", '"'),
        "",
        "",
        "class RequestFields(TypedDict, total=False):",
        '    """Keyword arguments of a request besides the prompt; None takes the default."""',
        "",
        *(_attribute(f) for f in rows if f.name != "prompt"),
        "    num_inference_steps: int | None",
        "    num_images_per_prompt: int | None",
        "",
    ])  # fmt: skip


def _mapping(name: str, items: Iterable[tuple[str, str | int]]) -> list[str]:
    lines = [
        line
        for key, value in items
        for line in (_entry(key, value) if isinstance(value, str) else [f'    "{key}": {value},'])
    ]
    return [f"{name} = {{", *lines, "}"]


def _help_line(field: Field) -> str:
    return "\n".join(_entry(field.name, field.help.replace("`", "")))


def _entry(key: str, value: str) -> list[str]:
    """A line of a mapping; a long text stands in brackets, a word-wrapped part a line."""
    line = f'    "{key}": "{value}",'
    if len(line) <= 100:
        return [line]
    width = 90  # beside 8 spaces and 2 quotes
    parts = [value] if len(value) <= width else textwrap.wrap(value, width - 1)
    parts = [f"{part} " for part in parts[:-1]] + parts[-1:]
    return [f'    "{key}": (', *(f'        "{part}"' for part in parts), "    ),"]


def _attribute(field: Field) -> str:
    kind = PYTHON_TYPES[field.data_type]
    if field.count > 1:
        kind = f"tuple[{', '.join([kind] * field.count)}]"
    return f"    {field.name}: {kind} | None"


def replaced(text: str, marks: tuple[str, str], inner: str) -> str:
    """`text` with `inner` between its marks.

    Raises:
        ValueError: a mark is missing.
    """
    before, first, rest = text.partition(marks[0])
    _, last, after = rest.partition(marks[1])
    if not first or not last:
        raise ValueError(f"no text between {marks[0].strip()!r} and {marks[1].strip()!r}")
    return f"{before}{first}{inner}{last}{after}"


Render = Callable[[str], str]
COPIES: dict[str, Render] = {  # what each file has to be, from what it is
    "model_repository/text_to_image/config.pbtxt": lambda text: replaced(
        text, PBTXT_MARKS, unary_inputs()
    ),
    "model_repository/text_to_image_stream/config.pbtxt": lambda text: replaced(
        text, PBTXT_MARKS, stream_inputs()
    ),
    "client/twinbrush_client/fields.py": lambda text: client_module(),
    "docs/metrics.md": lambda text: replaced(text, METRIC_MARKS, metrics_markdown()),
    "docs/requests.md": lambda text: replaced(text, DOCUMENT_MARKS, markdown()),
}


def main() -> None:
    for name, render in COPIES.items():
        path = ROOT / name
        old = path.read_text() if path.exists() else ""
        if (new := render(old)) != old:
            path.write_text(new)
            sys.stdout.write(f"{name}\n")


if __name__ == "__main__":
    main()
