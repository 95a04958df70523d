"""Which images take part in the next UNet call.

Latents of one shape can share a call; such images form a group. Groups that have work take
turns, so a size that few ask for is not starved. Inside a group the calls take turns too. One
goes to the images with the fewest steps left, so a short image is at most twice as long under
way as without longer ones. The next goes to the earliest deadlines, where the deadline is the
tick at which an image would be done were it alone, so no crowd of short ones starves a long
one. Both orders serve equal images as they arrived.

No arrays, no Triton, no threads: callers hold their own lock.
"""

from __future__ import annotations

import bisect
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar


@dataclass(eq=False)
class Job:
    """One image's claim on UNet calls.

    Attributes:
        group: images may share a call when their groups are equal.
        rows: UNet rows a step: 2 with classifier-free guidance, else 1.
        steps: calls that it needs in all.
        capacity: rows that a call of this group may have; the same for the whole group, and
            equal to `rows` for an image that shares its calls with nobody.
    """

    group: Hashable
    rows: int
    steps: int
    capacity: int
    step: int = field(default=0, init=False)  # calls that it has had
    deadline: tuple[int, int] = field(default=(0, 0), init=False)


SomeJob = TypeVar("SomeJob", bound=Job)


@dataclass(eq=False)
class _Group(Generic[SomeJob]):
    jobs: list[SomeJob]  # by deadline
    calls: int = 0


class StepBatcher(Generic[SomeJob]):
    """Chooses the jobs of one call at a time."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, _Group[SomeJob]] = {}  # in order of turn
        self._tick = 0
        self._arrivals = 0

    def __len__(self) -> int:
        return sum(len(group.jobs) for group in self._groups.values())

    def add(self, job: SomeJob) -> None:
        """Takes a job in.

        Raises:
            ValueError: the job has more rows than a call of its group may have.
        """
        if job.rows > job.capacity:
            raise ValueError(f"rows={job.rows} is not allowed: at most {job.capacity}")
        job.deadline = (self._tick + job.steps, self._arrivals)
        self._arrivals += 1
        group = self._groups.setdefault(job.group, _Group([]))
        bisect.insort(group.jobs, job, key=lambda j: j.deadline)

    def remove(self, job: SomeJob) -> None:
        """Frees the rows of a job before it is done; a job that is not here is no error."""
        group = self._groups.get(job.group)
        if group is not None and job in group.jobs:
            group.jobs.remove(job)
            if not group.jobs:
                del self._groups[job.group]

    def next_batch(self) -> list[SomeJob]:
        """The jobs of the next call, each one step further; finished jobs leave.

        Empty when there is no work.
        """
        if not self._groups:
            return []
        name = next(iter(self._groups))
        group = self._groups.pop(name)
        order = group.jobs
        if group.calls % 2 == 0:
            order = sorted(order, key=lambda job: (job.steps - job.step, job.deadline))
        chosen: list[SomeJob] = []
        free = order[0].capacity
        for job in order:
            if job.rows <= free:
                chosen.append(job)
                free -= job.rows
        for job in chosen:
            job.step += 1
        group.calls += 1
        group.jobs = [job for job in group.jobs if job.step < job.steps]
        if group.jobs:
            self._groups[name] = group  # at the back: the others have their turns first
        self._tick += 1
        return chosen
