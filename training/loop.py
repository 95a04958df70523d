"""The training loop that every stage shares: resume, save, learning rate, EMA, loss curve.

A stage gives its modules and a function from the number of a draw to a loss. What is drawn depends
on that number alone, or on a position in the data that is kept in the save, so a run that was
killed continues from its last save as if it had not been. Saves are safetensors and replace each
other atomically.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_cosine_schedule_with_warmup

from training.compute import Compute
from training.data import BadInput, Batches
from training.sheets import draw_losses, replace_picture

# Short sequences: on a CPU the fused kernel's backward is slower, above all in bf16.
_ATTENTION = {
    "cpu": [SDPBackend.MATH],
    "cuda": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}
_LOG_EVERY = 10  # steps; reading a loss waits for the device


class Trainer:
    """Trains `module`, on the device where it is, for `steps` steps, into files of `folder`.

    Every `save_every` steps it writes `state.safetensors`, `losses.png` and, if the stage draws
    any, `samples.png`; `losses.csv` grows between them.

    Raises:
        BadInput: the folder holds a save that is broken, of a module with other tensors, of
            more steps, or of a run with other `reads`.
    """

    def __init__(
        self,
        module: nn.Module,
        folder: Path,
        steps: int,
        learning_rate: float,
        ema_decay: float = 0.999,
        save_every: int = 100,
        compute: Compute | None = None,
        reads: str = "",
    ):
        self.module, self.folder, self.steps, self.save_every = module, folder, steps, save_every
        self.compute, self._reads = compute or Compute(), reads
        self.device = next(module.parameters()).device
        trainable = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, learning_rate, weight_decay=0.01)
        self.schedule = get_cosine_schedule_with_warmup(
            self.optimizer, min(100, steps // 10), steps
        )
        self.ema = AveragedModel(module, multi_avg_fn=_averaging(ema_decay))
        self.step = 0
        self._position: Any = None  # in the data, of the save that was loaded
        folder.mkdir(parents=True, exist_ok=True)
        if self._state.exists():
            self._load()
        if self.compute.main:
            self._forget_unsaved()

    @property
    def _state(self) -> Path:
        return self.folder / "state.safetensors"

    def run(
        self,
        loss_at: Callable[[int], dict[str, Tensor]],
        batches: Batches | None = None,
        samples: Callable[[nn.Module], Image.Image] | None = None,
    ) -> nn.Module:
        """Trains to the end; `loss_at(draw)["loss"]` is minimised.

        Args:
            loss_at: the losses of a draw, and what else is worth a curve; with one pass and one
                process the draw is the step.
            batches: the data of `loss_at`; their position is saved and restored.
            samples: draws `samples.png` with the EMA module.

        Returns:
            The EMA module.
        """
        if batches and self.step:
            batches.resume(self.compute.own(self._position))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        columns += (TimeRemainingColumn(), TextColumn("{task.fields[loss]}"))
        with Progress(*columns, disable=not self.compute.main) as bar:
            task = bar.add_task(self.folder.name, total=self.steps, completed=self.step, loss="")
            while self.step < self.steps:
                losses = self._update(loss_at)
                bar.update(task, completed=self.step)
                if self.step % _LOG_EVERY == 0 or self.step == self.steps:
                    shown = {k: round(v.item(), 5) for k, v in losses.items()}
                    bar.update(task, loss=f"loss {shown['loss']:.4f}")
                    self._log(shown)
                if self.step % self.save_every == 0 or self.step == self.steps:
                    self._save(batches.position if batches else None)
                    if self.compute.main:
                        self._draw(samples)
        if batches:
            batches.close()
            if report := batches.report():
                process = f" process {self.compute.index}:" if self.compute.processes > 1 else ""
                print(f"{self.folder.name}:{process} {report}")
        return self.ema.module

    def _update(self, loss_at: Callable[[int], dict[str, Tensor]]) -> dict[str, Tensor]:
        torch.manual_seed(self.step)  # dropout, which a resumed run must draw again
        kind = self.device.type
        self.optimizer.zero_grad(set_to_none=True)
        for draw in self.compute.draws(self.step):
            with sdpa_kernel(_ATTENTION[kind]):  # also where the backward pass recomputes
                with torch.autocast(kind, torch.bfloat16, self.compute.bf16):
                    losses = loss_at(draw)
                (losses["loss"] / self.compute.passes).backward()
        trained = self.optimizer.param_groups[0]["params"]
        self.compute.average(p.grad for p in trained if p.grad is not None)
        nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.ema.update_parameters(self.module)
        self.step += 1
        return losses

    def _log(self, losses: dict[str, float]) -> None:
        if not self.compute.main:
            return
        path = self.folder / "losses.csv"
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(["step", *losses])
            writer.writerow([self.step, *losses.values()])

    @torch.no_grad()
    def _draw(self, samples: Callable[[nn.Module], Image.Image] | None) -> None:
        draw_losses(self.folder / "losses.csv", self.folder / "losses.png")
        if samples:
            training = self.ema.training
            replace_picture(samples(self.ema.module.eval()), self.folder / "samples.png")
            self.ema.train(training)

    def _save(self, position: dict | None) -> None:
        position = self.compute.gather(position)
        if not self.compute.main:
            return
        tensors = {f"module.{k}": v for k, v in self.module.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
        part = self._state.with_suffix(".part")
        tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
        record = {"step": str(self.step), "position": json.dumps(position), "reads": self._reads}
        save_file(tensors, part, record)
        os.replace(part, self._state)

    def _load(self) -> None:
        try:
            with safe_open(self._state, "pt") as file:
                record = file.metadata()
            tensors = load_file(self._state, device=str(self.device))
        except SafetensorError as error:
            raise BadInput(f"--runs: {self._state} is broken: {error}")
        if record.get("reads", "") != self._reads:
            raise BadInput(f"--runs: {self._state} was saved from a run on other weights or seed")
        self._position = json.loads(record.get("position", "null"))
        try:
            self.module.load_state_dict(_under("module.", tensors))
            self.ema.load_state_dict(_under("ema.", tensors))
        except RuntimeError:
            raise BadInput(f"--runs: {self._state} was saved from a model of other tensors")
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer.", tensors).items():
            index, key = name.split(".", 1)
            # AdamW counts on the CPU.
            state.setdefault(int(index), {})[key] = tensor.cpu() if key == "step" else tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step = int(self.ema.n_averaged)
        if self.step > self.steps:
            raise BadInput(
                f"--steps: {self.steps} is less than the {self.step} that {self._state} has taken"
            )
        self.schedule.last_epoch = self.step
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.schedule.lr_lambdas[0](self.step)

    def _forget_unsaved(self) -> None:
        """Drops the rows of the loss curve that were written after the save."""
        path = self.folder / "losses.csv"
        if self.step == 0:
            path.unlink(missing_ok=True)
        elif path.exists():
            heading, *rows = path.read_text().splitlines(keepends=True)
            kept = (row for row in rows if int(row.split(",", 1)[0]) <= self.step)
            part = path.with_suffix(".part")
            part.write_text(heading + "".join(kept))
            os.replace(part, path)


def _averaging(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor | int], None]:
    """An EMA that is shorter at first, so that the random start is not long in it."""

    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        keep = min(decay, (1 + int(count)) / (10 + int(count)))
        get_ema_multi_avg_fn(keep)(averaged, current, count)

    return update


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
