"""Which point is measured next, and what becomes of one whose measurement went wrong.

In: tasks in order. Out: the next task for a process, until every task has a record.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

from fp8gate.filter.contract.shapes import LinearShape

MAX_RETRIES = 2  # of a point that the GPU slowed down in, or whose control was off
MAX_DEATHS = 2  # of processes at one point: the second death is the point's fault


@dataclass(frozen=True, slots=True)
class Task:
    """A point to measure. control: time bf16 against itself too. repeat: it was measured; see how far it differs."""

    shape: LinearShape
    control: bool = False
    repeat: bool = False


class TaskQueue:
    """Tasks not yet dealt out. `next` gives them in order, and those given back after all others.

    more: asked for further tasks when none is left. asked: how many tasks there were until now.
    """

    def __init__(self, tasks: Iterable[Task], more: Callable[[], Sequence[Task]] = tuple) -> None:
        self._waiting = list(tasks)
        self._more = more
        self.asked = len(self._waiting)
        self._repeated: set[LinearShape] = set()
        self._retries: Counter[Task] = Counter()
        self._deaths: Counter[Task] = Counter()

    @property
    def retries(self) -> int:
        """How often a task was given back."""
        return sum(self._retries.values()) + sum(self._deaths.values())

    def next(self, measured: Container[LinearShape] = ()) -> Task | None:
        """The first task for a process that has measured these shapes: a point and its repeat need two processes."""
        if not self._waiting:
            self._waiting += self._more()
            self.asked += len(self._waiting)
        for i, task in enumerate(self._waiting):
            is_pair = task.repeat or task.shape in self._repeated
            if not (is_pair and task.shape in measured):
                if task.repeat:
                    self._repeated.add(task.shape)
                return self._waiting.pop(i)
        return None

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def wait(self, until: float = math.inf) -> bool:
        """Whether there is anything to deal out before `until`, of `time.monotonic`."""
        return bool(self) and time.monotonic() < until

    def give_back(self, task: Task) -> None:
        """Not measured, for no fault of the point: it is scheduled again."""
        self._waiting.append(task)

    def may_retry(self, task: Task) -> bool:
        """Whether to measure it again later, as its numbers are not to be trusted; if so, it is scheduled."""
        if self._retries[task] == MAX_RETRIES:
            return False
        self._retries[task] += 1
        self._waiting.append(task)
        return True

    def may_try_after_death(self, task: Task) -> bool:
        """Whether to try again, as its process died; if so, it is scheduled."""
        if self._deaths[task] == MAX_DEATHS - 1:
            return False
        self._deaths[task] += 1
        self._waiting.append(task)
        return True
