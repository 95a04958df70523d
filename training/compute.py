"""How an optimiser step is computed: precision, passes, and processes that share it.

Several processes are those of `accelerate launch`; each draws its own pictures, and gradients are
averaged once a step. Knows nothing of what is trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from training.data import BadInput

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Compute:
    """Precision and division of an optimiser step.

    Attributes:
        bf16: bfloat16 products.
        passes: backward passes whose gradients are accumulated.
        accelerator: of several processes; None is one.
    """

    bf16: bool = False
    passes: int = 1
    accelerator: Accelerator | None = None

    @property
    def processes(self) -> int:
        return self.accelerator.num_processes if self.accelerator else 1

    @property
    def index(self) -> int:
        """Of this process; 0 writes files and draws progress."""
        return self.accelerator.process_index if self.accelerator else 0

    @property
    def main(self) -> bool:
        return self.index == 0

    def draws(self, step: int) -> list[int]:
        """The numbers of this process's draws in an optimiser step; no two processes share one."""
        first = step * self.passes
        return [(first + k) * self.processes + self.index for k in range(self.passes)]

    def average(self, gradients: Iterable[Tensor]) -> None:
        """Replaces gradients by their means over the processes."""
        if self.processes > 1:
            for gradient in gradients:
                gradient.copy_(self.accelerator.reduce(gradient, reduction="mean"))

    def gather(self, position: dict | None) -> Any:
        """The positions in the data of all processes, as `own` takes them."""
        if self.processes == 1:
            return position
        from accelerate.utils import gather_object

        return gather_object([position])

    def own(self, positions: Any) -> dict | None:
        """This process's position of those in a save.

        Raises:
            BadInput: the save is of another number of processes.
        """
        saved = len(positions) if isinstance(positions, list) else 1
        if saved != self.processes:
            raise BadInput(
                f"--runs: the save is of {saved} processes, these are {self.processes}: launch as"
                " many, or take another --runs"
            )
        return positions[self.index] if isinstance(positions, list) else positions
