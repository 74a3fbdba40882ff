"""What a person sees of a sweep while it runs: a bar on a terminal, a line a point elsewhere (a log, CI)."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fp8gate.calibrate.points.point_record import PointRecord
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.table import SweepProtocol as TableProtocol


class Observer(Protocol):
    """Told of every step of a sweep; a context for its duration."""

    def __enter__(self) -> Observer: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def finished(self, record: PointRecord) -> None: ...

    def say(self, message: str) -> None: ...


def make_observer(total: int, protocols: dict[Recipe, TableProtocol]) -> Observer:
    """A bar if standard error is a terminal, else lines."""
    console = Console(stderr=True)
    kind = Bar if console.is_terminal else Lines
    return kind(total, protocols, console)


class Bar:
    """One live line: points done, the last shape and its speedups, the time left."""

    def __init__(self, total: int, protocols: dict[Recipe, TableProtocol], console: Console) -> None:
        self._protocols = protocols
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[last]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID = self._progress.add_task("compiling", total=total, last="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def finished(self, record: PointRecord) -> None:
        last = describe(record, self._protocols)
        self._progress.update(self._task, advance=1, description=str(record.shape), last=last)

    def say(self, message: str) -> None:
        self._progress.console.print(message, highlight=False, markup=False)


class Lines:
    """A line a point, with the same content."""

    def __init__(self, total: int, protocols: dict[Recipe, TableProtocol], console: Console) -> None:
        self._total, self._protocols = total, protocols
        self._done = 0
        self._first_done_at = 0.0

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to put back."""

    def finished(self, record: PointRecord) -> None:
        self._done += 1
        self.say(
            f"[{self._done}/{self._total}] {record.shape} {describe(record, self._protocols)}, "
            f"{record.stages.on_device_s:.1f} s{self._time_left()}"
        )

    def _time_left(self) -> str:
        """At the pace since the first point: before that one, workers start and compile, which does not recur."""
        if self._done == 1:
            self._first_done_at = time.monotonic()
            return ""
        pace_s = (time.monotonic() - self._first_done_at) / (self._done - 1)
        minutes, seconds = divmod(round(pace_s * (self._total - self._done)), 60)
        return f", {minutes}:{seconds:02} left"

    def say(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)


def describe(record: PointRecord, protocols: dict[Recipe, TableProtocol]) -> str:
    """The speedups of a point, or why there are none: "tensorwise 1.32x rowwise out_of_memory"."""
    points = (record.point(recipe, protocols[recipe]) for recipe in record.recipes)
    return " ".join(
        f"{recipe} {point.status if point.speedup is None else f'{point.speedup:.2f}x'}"
        for recipe, point in zip(record.recipes, points, strict=True)
    )
