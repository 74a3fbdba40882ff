"""The sweep: measure every point that is not yet in the journal, then write the tables from the journal.

In: shapes, recipes, a device, a folder. Out: `<folder>/<device slug>/<recipe>.yaml`.
Try it: fp8gate calibrate --grid quick --out /tmp/tables
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import msgspec
import torch

from fp8gate.calibrate.device import describe_device, describe_software
from fp8gate.calibrate.gpu_watch import DeviceLock, Watch, foreign, make_watch
from fp8gate.calibrate.grid import grid_shapes, measuring_order, too_large
from fp8gate.calibrate.journal import Journal, Setup
from fp8gate.calibrate.linears import DATA, INDUCTOR
from fp8gate.calibrate.measure import SETTLE_S, DeviceLostError
from fp8gate.calibrate.progress import Observer, make_observer
from fp8gate.calibrate.records import ArmName, ArmRecord, PointRecord, Stages
from fp8gate.calibrate.report import Report, make_report, spread
from fp8gate.calibrate.schedule import Schedule, Task
from fp8gate.calibrate.worker import Job
from fp8gate.calibrate.workers import Died, InThisProcess, Workers, default_workers
from fp8gate.filter.devices import device_slug
from fp8gate.filter.shapes import LinearShape
from fp8gate.filter.table import RECIPES, Grid, Protocol, Recipe, Table, read_table, write_table

ROUNDS = (8, 12, 16, 24, 32, 48, 64, 96, 128)  # 8 is the fewest that give bounds at 99 %
CONFIDENCE = 0.99  # looking after every few rounds with 95 % bounds would give 15 % false decisions at a tie, 4 % so
THRESHOLD = 1.0
TOLERANCE = 0.01
PRECISION = 0.0025  # narrower than this, two processes differ by more than the bounds
NEAR, NEAR_S, FAR_S = 0.15, 0.35, 0.12
CONTROL_ERROR = 0.005
CPU_CONTROL_ERROR = 0.2  # wall-clock times of a shared machine: only gross faults show
MAX_ATTEMPTS = 2  # a point without numbers is tried once more by the next run: memory may have been taken then
CONTROL_SHARE = REPEAT_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a sweep came to. Without tables it is not complete; the same call goes on from there.

    off: control points whose bf16 against bf16 ratio was off, again and again, by so much; with any, no table is
    written.
    """

    tables: dict[Path, Table]
    report: Report
    remaining: int
    capped: dict[LinearShape, str]
    off: dict[LinearShape, float]


def make_setup(device: torch.device) -> Setup:
    """The set-up for production settings: compiled under CUDA graphs on a GPU, eager on a CPU."""
    on_gpu = device.type == "cuda"
    protocols = {
        recipe: Protocol(
            timer="cuda_graphs" if on_gpu else "wall_clock",
            compile=on_gpu,
            inductor=INDUCTOR[recipe] if on_gpu else {},
            bf16="eager",
            l2="cold",
            data=DATA,
            settle_s=SETTLE_S,
            rounds=ROUNDS,
            confidence=CONFIDENCE,
            threshold=THRESHOLD,
            tolerance=TOLERANCE,
            precision=PRECISION,
            near=NEAR,
            near_s=NEAR_S,
            far_s=FAR_S,
            control=CONTROL_ERROR if on_gpu else CPU_CONTROL_ERROR,
        )
        for recipe in RECIPES
    }
    return Setup(device=describe_device(device), software=describe_software(device), protocols=protocols)


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
    workers: int | None = None,
    seed: int = 0,
) -> SweepResult:
    """Measure `shapes` for `recipes` and write one table a recipe under `out`.

    grid: the axes the table will state. fresh: put an existing journal aside instead of going on with it.
    stop_after_s: begin no further point after so many seconds, and write no table unless all are done.
    workers: processes that compile and measure, 0 for this one alone; None: as the cores and the protocol allow.
    seed: of the order of points, of which are controls and repeats, and of the data.
    Raises ValueError if no point is left to measure or a table with other points would be replaced, JournalError if
    the journal is in use or damaged, DeviceBusyError if another sweep has the device, DeviceLostError if the GPU
    fails for good, WorkersDiedError if no worker can start.
    """
    folder = out / device_slug(setup.device.name)
    wanted = measuring_order(shapes, seed)
    swept = set(grid_shapes(grid))
    capped = {shape: why for shape in wanted if (why := too_large(shape, setup.device, on_grid=shape in swept))}
    wanted = [shape for shape in wanted if shape not in capped]
    if not wanted:
        raise ValueError(f"no point to measure: all {len(capped)} were left out, {next(iter(capped.values()), '')}")
    protocols = {recipe: setup.protocols[recipe] for recipe in recipes}
    if workers is None:
        workers = default_workers() if any(protocol.compile for protocol in protocols.values()) else 0
    with DeviceLock(device), Journal(folder, setup, fresh=fresh) as journal:
        if not fresh:
            _require_nothing_lost(folder, recipes, wanted, journal.records)
        tasks = _tasks(wanted, recipes, journal.records, seed)
        with make_observer(len(tasks), protocols) as observer:
            _say_start(observer, journal, len(tasks), len(wanted), capped)
            run = _Run(Job(device, protocols, seed), tasks, journal, observer, stop_after_s)
            run.measure(workers)
        remaining = len(tasks) - len(run.measured) - len(run.off)
        tables = {}
        if not remaining and not run.off:
            tables = _write_tables(folder, grid, recipes, journal, fresh)
        resumed = len(wanted) - sum(not task.repeat for task in tasks)
        return SweepResult(tables, run.report(resumed, len(capped)), remaining, capped, run.off)


def make_table(grid: Grid, recipe: Recipe, setup: Setup, records: Sequence[PointRecord]) -> Table:
    """A recipe's table from a journal's records; where a shape was measured twice, the last with numbers counts.

    `measured_at` is that of its newest record, so that the same measurements give the same file. Repeats only go into
    the protocol's spread.
    """
    latest: dict[LinearShape, PointRecord] = {}
    for record in (r for r in records if recipe in r.arms and not r.repeat):
        if record.shape not in latest or record.status(recipe) == "measured":
            latest[record.shape] = record
    protocol = setup.protocols[recipe]
    return Table(
        recipe=recipe,
        device=setup.device,
        software=setup.software,
        protocol=msgspec.structs.replace(protocol, spread=spread(recipe, protocol, records)),
        measured_at=max(r.measured_at for r in latest.values()),
        grid=grid,
        points=tuple(latest[shape].point(recipe, protocol) for shape in sorted(latest)),
    )


class _Run:
    """The measuring of one call: tasks out, records into the journal."""

    def __init__(
        self, job: Job, tasks: list[Task], journal: Journal, observer: Observer, stop_after_s: float | None
    ) -> None:
        self.job, self.journal, self.observer = job, journal, observer
        self.tasks = len(tasks)
        self.schedule = Schedule(tasks)
        self.measured: list[PointRecord] = []
        self.discarded: list[Stages] = []
        self.off: dict[LinearShape, float] = {}
        self.idle_s = self.starting_s = 0.0
        self.start = time.monotonic()
        self.deadline = None if stop_after_s is None else self.start + stop_after_s
        self.watch: Watch = make_watch(job.device)
        self.foreign: set[str] = set()

    def measure(self, workers: int) -> None:
        """Until every task has its record or the time is up."""
        if not self.tasks or self._is_late():
            return
        self._look_for_others([])
        crew = Workers(self.job, min(workers, self.tasks)) if workers else InThisProcess(self.job)
        with crew:
            try:
                for outcome in crew.run(self.schedule):
                    self._note(outcome.task, self._record(outcome) if isinstance(outcome, Died) else outcome.record)
                    self._look_for_others(crew.pids)
                    if self._is_late():
                        return
            except DeviceLostError as error:
                self._keep(error.args[0])
                raise
            finally:
                self.idle_s = crew.use.idle_s
                self.starting_s = (crew.use.first_turn_at or time.monotonic()) - self.start

    def report(self, resumed: int, capped: int) -> Report:
        return make_report(
            self.measured,
            self.job.protocols,
            discarded=self.discarded,
            resumed=resumed,
            retried=self.schedule.retries,
            capped=capped,
            total_s=time.monotonic() - self.start,
            starting_s=self.starting_s,
            idle_s=self.idle_s,
        )

    def _note(self, task: Task, record: PointRecord | None) -> None:
        """Journal a record, unless it is to be taken again: the GPU slowed down, or the control was off."""
        if record is None:
            return
        trouble = next((arm.detail for arm in record.arms.values() if arm.status == "unstable"), "")
        control_error = record.control_error(next(iter(self.job.protocols.values())))
        if control_error:
            trouble = f"bf16 against itself differs by {control_error:.1%}"
        if trouble and self.schedule.may_retry(task):
            self.observer.say(f"{task.shape}: {trouble}; measured again later")
            self.discarded.append(record.stages)
        elif control_error:
            self.observer.say(f"{task.shape}: {trouble}, again: not to be trusted")
            self.discarded.append(record.stages)
            self.off[task.shape] = control_error
        else:
            self._keep(record)

    def _keep(self, record: PointRecord) -> None:
        self.journal.append(record)
        self.measured.append(record)
        self.observer.finished(record)

    def _record(self, died: Died) -> PointRecord | None:
        """None if the task is tried again."""
        if self.schedule.may_try_after_death(died.task):
            self.observer.say(f"{died.task.shape}: {died.detail}; measured again later")
            return None
        shape = died.task.shape
        arms: tuple[ArmName, ...] = ("bf16", *self.job.protocols)
        return PointRecord(
            m=shape.m,
            k=shape.k,
            n=shape.n,
            measured_at=datetime.now(timezone.utc).replace(microsecond=0),
            stages=Stages(),
            process=0,
            repeat=died.task.repeat,
            arms=dict.fromkeys(arms, ArmRecord(status="failed", detail=f"{died.detail}, twice")),
        )

    def _look_for_others(self, own: Sequence[int]) -> None:
        """Name each other process on the device once."""
        for other in foreign(self.watch.processes(), own):
            if other not in self.foreign:
                self.foreign.add(other)
                self.observer.say(f"warning: another process is on the device and may spoil timings: {other}")

    def _is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


def _tasks(
    wanted: Sequence[LinearShape], recipes: Sequence[Recipe], records: Sequence[PointRecord], seed: int
) -> list[Task]:
    """Shapes that lack a recipe and those whose only attempt gave no number; then repeats of a share of all.

    All recipes asked for are measured there again, in one session.
    """
    first = [r for r in records if not r.repeat]
    measured = {(r.shape, recipe) for r in first for recipe in r.recipes if r.status(recipe) == "measured"}
    attempts = Counter((r.shape, recipe) for r in first for recipe in r.recipes)
    repeated = {(r.shape, recipe) for r in records if r.repeat for recipe in r.recipes}
    rng = random.Random(seed)
    controls = set(rng.sample(wanted, _share(CONTROL_SHARE, len(wanted))))
    repeats = rng.sample(wanted, _share(REPEAT_SHARE, len(wanted)))
    points = [
        Task(shape, control=shape in controls)
        for shape in wanted
        if any((shape, r) not in measured and attempts[shape, r] < MAX_ATTEMPTS for r in recipes)
    ]
    again = [Task(shape, repeat=True) for shape in repeats if any((shape, r) not in repeated for r in recipes)]
    return points + again


def _share(share: float, count: int) -> int:
    return max(1, round(share * count))


def _require_nothing_lost(
    folder: Path, recipes: Sequence[Recipe], wanted: Sequence[LinearShape], records: Sequence[PointRecord]
) -> None:
    """A small sweep must not replace a large table: raise ValueError before measuring, not after."""
    for recipe in recipes:
        path = folder / f"{recipe}.yaml"
        if path.exists():
            kept = {*wanted, *(record.shape for record in records if recipe in record.arms)}
            lost = sum(point.shape not in kept for point in read_table(path).points)
            if lost:
                raise ValueError(
                    f"{path}: {lost} of its points are not in this sweep and would be lost; "
                    "give another --out, or --fresh to replace the table"
                )


def _write_tables(
    folder: Path, grid: Grid, recipes: Sequence[Recipe], journal: Journal, fresh: bool
) -> dict[Path, Table]:
    """Write everything the journal holds for each recipe: a later, smaller sweep adds to a table."""
    tables = {}
    for recipe in recipes:
        path = folder / f"{recipe}.yaml"
        table = make_table(grid, recipe, journal.setup, journal.records)
        tables[path] = table if fresh else _with_earlier_axes(table, path)
        write_table(tables[path], path)
    return tables


def _with_earlier_axes(table: Table, path: Path) -> Table:
    """State the axes of the table being replaced too, where their points are in the new one."""
    if not path.exists():
        return table
    earlier, shapes = read_table(path), {point.shape for point in table.points}
    if not shapes.issuperset(point.shape for point in earlier.points):
        return table
    old, new = earlier.grid, table.grid
    axes = {axis: tuple(sorted({*getattr(old, axis), *getattr(new, axis)})) for axis in ("m", "k", "n")}
    return msgspec.structs.replace(table, grid=Grid(**axes))


def _say_start(observer: Observer, journal: Journal, todo: int, wanted: int, capped: dict[LinearShape, str]) -> None:
    device = journal.setup.device
    observer.say(f"{device.name}: {todo} measurements to take at {wanted} points, journal {journal.path}")
    if journal.set_aside:
        observer.say(f"the earlier journal is kept as {journal.set_aside}")
    for other in journal.others():
        observer.say(f"{other} is of other software, protocol or device: not used")
    if capped:
        observer.say(f"{len(capped)} points left out, too large to measure here:")
        for shape, why in sorted(capped.items()):
            observer.say(f"  {shape}: {why}")
