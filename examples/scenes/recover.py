"""`python -m examples.scenes.recover`: `training.recover` on scenes, or on its `--data`."""

from __future__ import annotations

import typer

from examples.scenes.world import world_for
from training.recover import command

main = command(world_for)

if __name__ == "__main__":
    typer.run(main)
