"""Compares families with diffusers and writes the table: `python tests/family_table.py [NAME...]`.

Writes `benchmarks/results/families.json` and the table between marks of `docs/checkpoints.md`;
rows of families that are not named stay. Families that differ in their scheduler alone share an
export.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from families import FAMILIES, Family, shallow, write_family  # noqa: E402
from harness import skeleton  # noqa: E402
from test_families import paint_in_pytorch, paint_served, paint_with_diffusers  # noqa: E402

from export.checkpoint import open_checkpoint  # noqa: E402
from export.repository import build  # noqa: E402
from export.source import Source  # noqa: E402
from twinbrush.engine.field_tables import replaced  # noqa: E402

RESULT, DOCUMENT = ROOT / "benchmarks/results/families.json", ROOT / "docs/checkpoints.md"
MARKS = ("<!-- families -->\n", "<!-- end of families -->\n")


class Exports:
    """Repositories of shallow families, one for each set of networks."""

    def __init__(self, folder: Path):
        self._folder, self._made = folder, {}

    def repository(self, source: Path, family: Family) -> Path:
        networks = str((family.unet, family.open_clip, family.xl, family.vq, family.layers))
        folder = self._folder / str(len(list(self._folder.iterdir())))
        if networks in self._made:
            shutil.copytree(self._made[networks], folder)
            build(open_checkpoint(source), folder, only=["fusion"])  # and the scheduler
        else:
            build(open_checkpoint(source), skeleton(folder))
            self._made[networks] = folder
        return folder


def compare(name: str, folder: Path, exports: Exports) -> dict[str, object]:
    """One row: what was compared, and the largest differences of 255."""
    whole, small = FAMILIES[name], shallow(FAMILIES[name])
    source = write_family(folder / "whole", whole)
    in_pytorch = paint_in_pytorch(Source(str(source)), whole, folder)
    with pytest.MonkeyPatch.context() as patch:
        difference = np.abs(in_pytorch - paint_with_diffusers(source, whole, patch)).max()
    source = write_family(folder / "shallow", small)
    exported = paint_served(exports.repository(source, small), small)
    with pytest.MonkeyPatch.context() as patch:
        of_export = np.abs(exported - paint_with_diffusers(source, small, patch)).max()
    return {
        "family": name,
        "pipeline": whole.pipeline,
        "scheduler": whole.scheduler[0],
        "prediction": whole.scheduler[1].get("prediction_type", "epsilon"),
        "steps": whole.steps,
        "guidance_scale": whole.guidance_scale,
        "difference": round(float(difference), 2),
        "difference_exported": round(float(of_export), 2),
    }


def markdown(rows: list[dict[str, object]]) -> str:
    lines = ["| structure of | compared with | steps, guidance | in PyTorch | exported |",
             "|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        other = f"{row['pipeline']}, {row['scheduler']}, {row['prediction']}"
        settings = f"{row['steps']}, {row['guidance_scale']:g}"
        differences = f"{row['difference']} | {row['difference_exported']}"
        lines.append(f"| {row['family']} | {other} | {settings} | {differences} |")
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    rows = {row["family"]: row for row in json.loads(RESULT.read_text())}
    with tempfile.TemporaryDirectory() as kept:
        exports = Exports(Path(kept))
        for name in names or FAMILIES:
            with tempfile.TemporaryDirectory() as folder:
                rows[name] = row = compare(name, Path(folder), exports)
            both = f"{row['difference']}, exported {row['difference_exported']}"
            print(f"{name}: {both}", flush=True)
            table = [rows[family] for family in FAMILIES if family in rows]
            RESULT.write_text(json.dumps(table, indent=2) + "\n")
            DOCUMENT.write_text(replaced(DOCUMENT.read_text(), MARKS, markdown(table)))


if __name__ == "__main__":
    main(sys.argv[1:])
