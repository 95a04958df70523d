"""Which images take part in the next UNet call.

Latents of one shape can share a call; such images form a group. Groups that have work take
turns, so a size that few ask for is not starved. Inside a group the image with the earliest
deadline goes first, where the deadline is the tick at which it would be done were it alone:
equal requests run in order of arrival, a short one overtakes a long one, and a long one
waits at most for those that arrived while it could have run.

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


class StepBatcher(Generic[SomeJob]):
    """Chooses the jobs of one call at a time."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, list[SomeJob]] = {}  # in order of turn; jobs by deadline
        self._tick = 0
        self._arrivals = 0

    def __len__(self) -> int:
        return sum(len(jobs) for jobs in self._groups.values())

    def add(self, job: SomeJob) -> None:
        """Takes a job in.

        Raises:
            ValueError: the job has more rows than a call of its group may have.
        """
        if job.rows > job.capacity:
            raise ValueError(f"rows={job.rows} is not allowed: at most {job.capacity}")
        job.deadline = (self._tick + job.steps, self._arrivals)
        self._arrivals += 1
        jobs = self._groups.setdefault(job.group, [])
        bisect.insort(jobs, job, key=lambda j: j.deadline)

    def remove(self, job: SomeJob) -> None:
        """Frees the rows of a job before it is done; a job that is not here is no error."""
        jobs = self._groups.get(job.group, [])
        if job in jobs:
            jobs.remove(job)
            if not jobs:
                del self._groups[job.group]

    def next_batch(self) -> list[SomeJob]:
        """The jobs of the next call, each one step further; finished jobs leave.

        Empty when there is no work.
        """
        if not self._groups:
            return []
        group = next(iter(self._groups))
        waiting = self._groups.pop(group)
        chosen: list[SomeJob] = []
        free = waiting[0].capacity
        for job in waiting:
            if job.rows <= free:
                chosen.append(job)
                free -= job.rows
        for job in chosen:
            job.step += 1
        left = [job for job in waiting if job.step < job.steps]
        if left:
            self._groups[group] = left  # at the back: the others have their turns first
        self._tick += 1
        return chosen
