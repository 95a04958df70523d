"""`python -m examples.scenes.benchmarks.pruning`: pruning against the count of right pictures.

Held-out prompts are painted and read back; models recover on scenes, or on `--data`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import typer

from benchmarks.pruning import command
from examples.scenes.quality import score, share, tasks
from examples.scenes.reader import read
from examples.scenes.world import SceneWorld


class AllCorrect:
    """Percent of pictures that show all their prompt names, with its interval."""

    key, label = "percent", "pictures all correct, %"
    goals = {  # noqa: RUF012
        "unet": {"macs_removed": 30.0, "speedup_b1": 1.25, "speedup_b16": 1.25, "points_lost": 1.0}
    }

    def __init__(self, n: int):
        self._tasks = tasks(n)
        self.prompts = [task.prompt for task in self._tasks]

    def start(self, pictures: list[np.ndarray]) -> None:
        """Pictures are read by themselves."""

    def score(self, pictures: list[np.ndarray]) -> dict[str, Any] | None:
        return share(
            score(task, read(picture)).all_correct
            for task, picture in zip(self._tasks, pictures, strict=True)
        )


main = command(
    "python -m examples.scenes.benchmarks.pruning", AllCorrect, n=1000, world=SceneWorld()
)

if __name__ == "__main__":
    typer.run(main)
