"""What a person sees of a sweep while it runs: a bar on a terminal, a line a point elsewhere (a log, CI)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from fp8gate.calibrate.points.point_record import PointRecord
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.table import SweepProtocol as TableProtocol

if TYPE_CHECKING:
    from typing_extensions import Self

PACE_S = 300.0  # the time left goes by the pace of the last minutes: points of one size take very different times


class Observer(Protocol):
    """Told of every step of a sweep; a context for its duration."""

    def __enter__(self) -> Observer: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def finished(self, record: PointRecord) -> None: ...

    def say(self, message: str) -> None: ...

    def expect(self, total: int) -> None:
        """There will be so many steps, or fewer."""


def make_observer(total: int, protocols: dict[Recipe, TableProtocol]) -> Observer:
    """A bar if standard error is a terminal, else lines."""
    console = Console(stderr=True)
    kind = Bar if console.is_terminal else Lines
    return kind(total, protocols, console)


class _BarAboveText(Progress):
    """The bar on a line of its own, so that it fits; beneath it the last point, on as many lines as it needs."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from (Text(task.description) for task in self.tasks)


def _make_bar(console: Console, *, is_transient: bool = False) -> Progress:
    return _BarAboveText(
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        expand=True,
        transient=is_transient,
        speed_estimate_period=PACE_S,
        get_time=lambda: time.monotonic(),
    )


class _LiveBar:
    """A bar that is shown while it is entered."""

    def __init__(self, console: Console, total: int | None, *, is_transient: bool = False) -> None:
        self._progress = _make_bar(console, is_transient=is_transient)
        self._task: TaskID = self._progress.add_task("starting", total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class Bar(_LiveBar):
    """Live lines: points done, a bar, the time left; the last shape and its speedups."""

    def __init__(self, total: int, protocols: dict[Recipe, TableProtocol], console: Console) -> None:
        super().__init__(console, total)
        self._protocols = protocols

    def finished(self, record: PointRecord) -> None:
        last = f"{record.shape} {describe(record, self._protocols)}"
        self._progress.update(self._task, advance=1, description=last)

    def say(self, message: str) -> None:
        self._progress.console.print(message, highlight=False, markup=False)

    def expect(self, total: int) -> None:
        self._progress.update(self._task, total=total)


class Lines:
    """A line a point, with the same content."""

    def __init__(self, total: int, protocols: dict[Recipe, TableProtocol], console: Console) -> None:
        self._protocols = protocols
        self._steps = Steps(total)

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to put back."""

    def finished(self, record: PointRecord) -> None:
        left = self._steps.one_more()
        self.say(
            f"[{self._steps.done}/{self._steps.total}] {record.shape} {describe(record, self._protocols)}, "
            f"{record.stages.on_device_s:.1f} s{left}"
        )

    def say(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    def expect(self, total: int) -> None:
        self._steps.total = total


class Steps:
    """Counts steps, and says when all will be done."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._first_done_at = 0.0

    def one_more(self) -> str:
        """ ", 1:05 left", at the pace since the first step: before it, workers start and compile. "" if unknown."""
        self.done += 1
        self.total = max(self.total, self.done)
        if self.done == 1:
            self._first_done_at = time.monotonic()
        if self.done in (1, self.total):
            return ""
        pace_s = (time.monotonic() - self._first_done_at) / (self.done - 1)
        minutes, seconds = divmod(round(pace_s * (self.total - self.done)), 60)
        return f", {minutes}:{seconds:02} left"


class StepsBar(_LiveBar):
    """A live bar beneath what is printed meanwhile, for one series of steps after another. It goes at the end."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, None, is_transient=True)
        self._shown: Steps | None = None

    def show(self, steps: Steps, what: str) -> None:
        if steps is not self._shown:
            self._progress.reset(self._task)
            self._shown = steps
        self._progress.update(self._task, completed=steps.done, total=steps.total, description=what)


def steps_bar(is_wanted: bool) -> AbstractContextManager[StepsBar | None]:
    """A bar on standard error; None if it is not wanted, or if that is no terminal."""
    console = Console(stderr=True)
    return StepsBar(console) if is_wanted and console.is_terminal else nullcontext()


def describe(record: PointRecord, protocols: dict[Recipe, TableProtocol]) -> str:
    """The speedups of a point, or why there are none: "tensorwise 1.32x rowwise out_of_memory"."""
    points = (record.point(recipe, protocols[recipe]) for recipe in record.recipes)
    return " ".join(
        f"{recipe} {point.status if point.speedup is None else f'{point.speedup:.2f}x'}"
        for recipe, point in zip(record.recipes, points, strict=True)
    )
