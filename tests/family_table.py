"""Compares every family with diffusers and writes the table: `python tests/family_table.py`.

Writes `benchmarks/results/families.json` and the table between marks of `docs/checkpoints.md`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from families import FAMILIES, write_family  # noqa: E402
from harness import skeleton  # noqa: E402
from test_families import paint_served, paint_with_diffusers  # noqa: E402

from export.checkpoint import open_checkpoint  # noqa: E402
from export.repository import build  # noqa: E402
from twinbrush.engine.field_tables import replaced  # noqa: E402

RESULT, DOCUMENT = ROOT / "benchmarks/results/families.json", ROOT / "docs/checkpoints.md"
MARKS = ("<!-- families -->\n", "<!-- end of families -->\n")


def compare(name: str, folder: Path) -> dict[str, object]:
    """One row: what was compared, and the largest difference of 255."""
    family = FAMILIES[name]
    source = write_family(folder / "checkpoint", family)
    repository = skeleton(folder / "served")
    build(open_checkpoint(source), repository)
    with pytest.MonkeyPatch.context() as patch:
        theirs = paint_with_diffusers(source, family, patch)
    difference = float(np.abs(paint_served(repository, family) - theirs).max())
    return {
        "family": name,
        "pipeline": family.pipeline,
        "scheduler": family.scheduler[0],
        "prediction": family.scheduler[1].get("prediction_type", "epsilon"),
        "steps": family.steps,
        "guidance_scale": family.guidance_scale,
        "difference": round(difference, 2),
    }


def markdown(rows: list[dict[str, object]]) -> str:
    lines = ["| structure of | compared with | steps, guidance | largest difference of 255 |",
             "|---|---|---|---|"]  # fmt: skip
    for row in rows:
        other = f"{row['pipeline']}, {row['scheduler']}, {row['prediction']}"
        settings = f"{row['steps']}, {row['guidance_scale']:g}"
        lines.append(f"| {row['family']} | {other} | {settings} | {row['difference']} |")
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    rows = []
    for name in names or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compare(name, Path(folder)))
        sys.stdout.write(f"{name}: {rows[-1]['difference']}\n")
    if not names:
        RESULT.write_text(json.dumps(rows, indent=2) + "\n")
        DOCUMENT.write_text(replaced(DOCUMENT.read_text(), MARKS, markdown(rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
