"""The sweep: measure every point that is not yet in the journal, then write the tables from the journal.

In: shapes, recipes, a device, a folder. Out: `<folder>/<device slug>/<recipe>.yaml`, or `<recipe>-fp8gate_casts.yaml`.
Try it: fp8gate calibrate --grid quick --out /tmp/tables
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import msgspec
import torch

from fp8gate.calibrate.device.capacity import useful_workers
from fp8gate.calibrate.device.lock import DeviceLock
from fp8gate.calibrate.device.registry import KINDS, kind_of
from fp8gate.calibrate.device.timing_lock import timing_lock_file
from fp8gate.calibrate.grid.grid import grid_shapes, measuring_order, too_large
from fp8gate.calibrate.grid.refinement import Refinement
from fp8gate.calibrate.points.measure_point import DeviceLostError
from fp8gate.calibrate.points.noise import calm
from fp8gate.calibrate.points.point_worker import Job
from fp8gate.calibrate.points.setup import Setup
from fp8gate.calibrate.points.task_queue import Task, TaskQueue
from fp8gate.calibrate.sweep.agenda import Agenda
from fp8gate.calibrate.sweep.journal import SweepJournal
from fp8gate.calibrate.sweep.progress import Observer, make_observer
from fp8gate.calibrate.sweep.session import JournalLedger, SessionResult, SweepSession
from fp8gate.calibrate.sweep.sweep_report import SweepReport, make_sweep_report
from fp8gate.calibrate.sweep.sweep_tasks import SweepTasks, tasks_left
from fp8gate.calibrate.sweep.table_writing import (
    is_to_be_replaced,
    require_nothing_lost,
    require_same_device,
    rows_of,
    write_incomplete_tables,
    write_tables,
)
from fp8gate.filter.contract.devices import device_slug
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Device, Grid, Incomplete, Table, TableError, read_table


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a sweep came to. Without tables it is not complete; the same call goes on from there.

    incomplete: the tables of what there is, which it wrote instead. off: control points whose ratio of bf16 to bf16 was
    off again and again, and by how much. With any of them no table is written.
    """

    tables: dict[Path, Table]
    report: SweepReport
    remaining: int
    capped: dict[LinearShape, str]
    off: dict[LinearShape, float]
    incomplete: Mapping[Path, Table] = field(default_factory=dict)


class Measuring(Protocol):
    """How the tasks of a sweep are measured: by this process, or by many ranks."""

    @property
    def ranks(self) -> int:
        """How many devices measure."""

    @property
    def ranks_here(self) -> int:
        """How many of them share this machine."""

    def measure(
        self, tasks: SweepTasks, ledger: JournalLedger, device: torch.device, workers: int, stop_after_s: float | None
    ) -> SessionResult:
        """Measure them all; every record is in the ledger as soon as it is there."""


@dataclass(frozen=True, slots=True)
class MeasuringAlone:
    """This process and its workers, on one device. agenda: what the same processes measure after the tasks, or None."""

    agenda: Agenda | None = None
    ranks: ClassVar[int] = 1
    ranks_here: ClassVar[int] = 1

    def measure(
        self, tasks: SweepTasks, ledger: JournalLedger, device: torch.device, workers: int, stop_after_s: float | None
    ) -> SessionResult:
        """Raises DeviceLostError, its record kept."""
        measured_on = kind_of(device).identity(device, 0)
        todo = [*tasks.tasks, *tasks.own_tasks(measured_on)]
        before = len(ledger.measured) + len(ledger.off)
        with timing_lock_file() as timing_lock:
            job = Job(device, tasks.protocols, tasks.seed, timing_lock, measured_on)
            queue = TaskQueue(todo, self.agenda.more) if self.agenda else TaskQueue(todo)
            session = SweepSession(job, queue, ledger, stop_after_s=stop_after_s)
            try:
                session.measure(min(workers, len(todo) + (self.agenda.at_most if self.agenda else 0)))
            except DeviceLostError as error:
                ledger.keep(Task(error.record.shape), error.record)
                raise
        return session.result(remaining=queue.asked - (len(ledger.measured) + len(ledger.off) - before))


def sweep(
    grid: Grid,
    shapes: Iterable[LinearShape],
    *,
    recipes: Sequence[Recipe],
    device: torch.device,
    setup: Setup,
    out: Path,
    fresh: bool = False,
    stop_after_s: float | None = None,
    refines: bool = False,
    writes_incomplete: bool = True,
    workers: int | None = None,
    seed: int = 0,
    measuring: Measuring | None = None,
) -> SweepResult:
    """Measure `shapes` for `recipes` and write one table a recipe under `out`.

    grid: the axes that the table will state. fresh: put an existing journal aside instead of going on with it.
    stop_after_s: begin no further point after so many seconds. refines: of the grid, measure a coarse part and then
    the points near which float8 breaks even; with several ranks there is time for all. writes_incomplete: if it ends
    before all points are measured, by this or by an error, write incomplete tables of those that are.
    workers: processes that compile and measure, 0 for this one alone; None: as the cores and the protocol allow.
    seed: of the order of points, of the choice of controls and repeats, and of the data. measuring: None for this
    process alone.
    Raises InputError if no point is left to measure or a table with other points would be replaced, JournalError if
    the journal is in use or damaged, DeviceBusyError if another sweep has the device, DeviceLostError if the device
    fails for good, NoChildError if no worker can start.
    """
    start = time.monotonic()
    by = measuring or MeasuringAlone()
    folder = out / device_slug(setup.device.name)
    protocols = {recipe: setup.protocols[recipe] for recipe in recipes}
    if workers is None:
        workers = useful_workers(setup.device, protocols, by.ranks_here)
        look_workers = max(1, workers)  # so that another process looks again
    else:
        look_workers = workers
    wanted, capped = _affordable(grid, measuring_order(shapes, seed), setup.device, workers)
    if not wanted:
        raise InputError(f"no point to measure: all {len(capped)} were left out, {next(iter(capped.values()), '')}")
    with DeviceLock(device), SweepJournal(folder, setup, fresh=fresh, replaces=recipes) as journal:
        require_same_device(folder, recipes, setup)
        if not fresh:
            require_nothing_lost(folder, recipes, wanted, journal)
        refinement = None
        if refines and not measuring:
            refinement = Refinement(grid, wanted, always=_known_shapes(folder, recipes, journal))
        first = refinement.first if refinement else wanted
        drawn_from = refinement.first_of_any if refinement else wanted
        tasks = tasks_left(setup, first, recipes, journal.records, seed, drawn_from)
        own_tasks = tasks.own_tasks(kind_of(device).identity(device, 0))
        todo = len(tasks.tasks) + len(own_tasks) * by.ranks
        ledger = JournalLedger(journal, make_observer(todo, protocols), asked=todo)
        agenda = Agenda(tasks, first, refinement, ledger, grid=grid, repeats=look_workers > 0)
        unfinished = _Unfinished(folder, grid, recipes, agenda, fresh)
        if not measuring and workers == look_workers:
            by = MeasuringAlone(agenda)
        stop_at = None if stop_after_s is None else start + stop_after_s
        try:
            with ledger.observer as observer:
                _say_start(observer, journal, todo, len(first), len(wanted) - len(first), capped)
                ledger.ask(0, agenda.undecided)
                session = by.measure(tasks, ledger, device, workers, stop_after_s)
                if not session.remaining:
                    ledger.forget_rest()  # repeats of a rank that was lost
                while not session.remaining and (again := agenda.more()):
                    left_s = None if stop_at is None else max(0.0, stop_at - time.monotonic())
                    later = msgspec.structs.replace(tasks, tasks=tuple(again), repeats=())
                    looking = MeasuringAlone(agenda)
                    session = session.then(looking.measure(later, ledger, device, look_workers, left_s))
        except BaseException as error:  # Ctrl-C and signals too
            if writes_incomplete and not isinstance(error, InputError):  # after which another command is to be run
                unfinished.write(ledger)
            raise
        if not ledger.measured and not session.remaining:
            _say_nothing_was_left(ledger)
        tables = {}
        if not session.remaining and not ledger.off:
            tables = write_tables(folder, grid, recipes, journal, fresh)
        report = make_sweep_report(
            ledger.measured,
            protocols,
            session,
            rows={recipe: rows_of(recipe, setup, journal.records) for recipe in recipes},
            history=calm(journal.records, KINDS[setup.device.kind].defaults.noise),
            resumed=agenda.before,
            capped=len(capped),
            total_s=time.monotonic() - start,
        )
        incomplete = unfinished.write(ledger) if session.remaining and writes_incomplete else {}
        return SweepResult(tables, report, session.remaining, capped, ledger.off, incomplete)


@dataclass(frozen=True, slots=True)
class _Unfinished:
    """Writes what there is of a sweep that ends early."""

    folder: Path
    grid: Grid
    recipes: Sequence[Recipe]
    agenda: Agenda
    fresh: bool

    def write(self, ledger: JournalLedger) -> Mapping[Path, Table]:
        """The incomplete tables, by file; it says what is missing. None if controls were off: numbers are not trusted.

        That they cannot be written must not hide why the sweep ended, so it is only said.
        """
        measured = self.agenda.before + ledger.asked - max(1, ledger.left)
        of = measured + max(1, ledger.left) + self.agenda.undecided
        if ledger.off:
            ledger.say(f"no table is written: bf16 against itself was off at {len(ledger.off)} points")
        if ledger.off or not measured:
            return {}
        incomplete = Incomplete(measured=measured, of=of)
        try:
            tables = write_incomplete_tables(
                self.folder, self.grid, self.recipes, ledger.journal, incomplete, self.fresh
            )
        except (OSError, TableError) as error:
            ledger.say(f"the incomplete tables cannot be written: {error}")
            return {}
        for path, why in tables.withheld.items():
            ledger.say(f"{path} {why}")
        for path in tables.written:
            ledger.say(f"wrote {path}, incomplete: {incomplete}")
        if tables.written:
            again = "the same command without --fresh" if self.fresh else "the same command"
            ledger.say(f"{of - measured} measurements are missing: {again} takes them and completes the tables")
        return tables.written


def _known_shapes(folder: Path, recipes: Sequence[Recipe], journal: SweepJournal) -> set[LinearShape]:
    """The shapes of the tables that are kept: what is known is measured again, so that nothing of it is lost."""
    known: set[LinearShape] = set()
    for recipe in recipes:
        path = folder / journal.setup.variant(recipe).file
        if path.exists() and not is_to_be_replaced(path, recipe, journal):
            known.update(point.shape for point in read_table(path).points)
    return known


def _affordable(
    grid: Grid, shapes: Sequence[LinearShape], device: Device, workers: int
) -> tuple[list[LinearShape], dict[LinearShape, str]]:
    """The shapes that are measured, and those left out, with the reason. Workers keep some of the device's memory."""
    swept = set(grid_shapes(grid))
    taken_gib = workers * KINDS[device.kind].defaults.worker_gib
    reasons = {s: too_large(s, device, on_grid=s in swept, taken_gib=taken_gib) for s in shapes}
    return [s for s in shapes if not reasons[s]], {s: reason for s, reason in reasons.items() if reason}


def _say_nothing_was_left(ledger: JournalLedger) -> None:
    """Say that the numbers are old: a user who wants new ones must not mistake them."""
    records = ledger.journal.records
    newest = max(record.measured_at for record in records)
    ledger.say(
        f"nothing was left to measure: the tables are made of {len(records)} measurements of the journal, the newest "
        f"of {newest:%Y-%m-%d %H:%M} UTC; --fresh measures again"
    )


def _say_start(
    observer: Observer, journal: SweepJournal, todo: int, wanted: int, undecided: int, capped: dict[LinearShape, str]
) -> None:
    device, casts = journal.setup.device, next(iter(journal.setup.protocols.values())).casts
    ours = "" if casts == "inductor" else f" with {casts}'s casts"
    observer.say(f"{device.name}: {todo} measurements{ours} to take at {wanted} points, journal {journal.path}")
    if undecided:
        observer.say(f"then those of {undecided} points near which float8 breaks even (--grid full: all)")
    for remark in journal.remarks():
        observer.say(remark)
    for other in journal.others():
        observer.say(f"{other} is of other software, protocol or device: not used")
    if capped:
        observer.say(f"{len(capped)} points left out, too large to measure here:")
        for shape, why in sorted(capped.items()):
            observer.say(f"  {shape}: {why}")
