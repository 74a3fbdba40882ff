"""The sweep: measure every point that is not yet in the journal, then write the tables from the journal.

In: shapes, recipes, a device, a folder. Out: `<folder>/<device slug>/<recipe>.yaml`.
Try it: fp8gate calibrate --grid quick --out /tmp/tables
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from fp8gate.calibrate.capacity import WORKER_DEVICE_GIB, default_workers
from fp8gate.calibrate.device import describe_device, describe_software
from fp8gate.calibrate.gpu_watch import DeviceLock, Watch, foreign, make_watch
from fp8gate.calibrate.grid import grid_shapes, measuring_order, too_large
from fp8gate.calibrate.journal import Journal, Setup
from fp8gate.calibrate.linears import DATA, INDUCTOR
from fp8gate.calibrate.measure import PAUSE_S, RUN_S, SETTLE_S, DeviceLostError
from fp8gate.calibrate.progress import Observer, make_observer
from fp8gate.calibrate.records import ArmName, ArmRecord, PointRecord, Stages
from fp8gate.calibrate.report import Report, make_report
from fp8gate.calibrate.schedule import Schedule, Task
from fp8gate.calibrate.tables import require_nothing_lost, write_tables
from fp8gate.calibrate.worker import Job
from fp8gate.calibrate.workers import Died, InThisProcess, Workers
from fp8gate.filter.devices import device_slug
from fp8gate.filter.shapes import LinearShape
from fp8gate.filter.table import RECIPES, Device, Grid, Protocol, Recipe, Table

ROUNDS = (10, 30)  # 8 would give bounds at 99 %, but those of the extremes
CONFIDENCE = 0.99  # looking after every few rounds with 95 % bounds would give 15 % false decisions at a tie, 4 % so
THRESHOLD = 1.0
TOLERANCE = 0.01
NEAR, NEAR_S = 0.05, 1.0
"""Under the power limit a short run errs by 2 %, twice that at times, a whole second by less than 0.5 %: what lies
nearer to the threshold than the first can tell runs for the second (LOG.md, 2026-11-24)."""
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
            run_s=RUN_S,
            pause_s=PAUSE_S,
            rounds=ROUNDS,
            confidence=CONFIDENCE,
            threshold=THRESHOLD,
            tolerance=TOLERANCE,
            near=NEAR,
            near_s=NEAR_S,
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
    protocols = {recipe: setup.protocols[recipe] for recipe in recipes}
    if workers is None:
        workers = _useful_workers(setup.device, protocols)
    wanted, capped = _affordable(grid, measuring_order(shapes, seed), setup.device, workers)
    if not wanted:
        raise ValueError(f"no point to measure: all {len(capped)} were left out, {next(iter(capped.values()), '')}")
    with DeviceLock(device), Journal(folder, setup, fresh=fresh) as journal:
        if not fresh:
            require_nothing_lost(folder, recipes, wanted, journal.records)
        tasks = _tasks(wanted, recipes, journal.records, seed)
        with make_observer(len(tasks), protocols) as observer:
            _say_start(observer, journal, len(tasks), len(wanted), capped)
            run = _Run(Job(device, protocols, seed), tasks, journal, observer, stop_after_s)
            run.measure(workers)
        remaining = len(tasks) - len(run.measured) - len(run.off)
        tables = {}
        if not remaining and not run.off:
            tables = write_tables(folder, grid, recipes, journal, fresh)
        resumed = len(wanted) - sum(not task.repeat for task in tasks)
        return SweepResult(tables, run.report(resumed, len(capped)), remaining, capped, run.off)


def _useful_workers(device: Device, protocols: Mapping[Recipe, Protocol]) -> int:
    """None where nothing is compiled: workers exist to do that beside the timing."""
    if not any(protocol.compile for protocol in protocols.values()):
        return 0
    return default_workers(device.memory_gib if device.kind == "cuda" else None)


def _affordable(
    grid: Grid, shapes: Sequence[LinearShape], device: Device, workers: int
) -> tuple[list[LinearShape], dict[LinearShape, str]]:
    """The shapes that are measured, and those left out with the reason; each worker keeps some of a GPU's memory."""
    swept = set(grid_shapes(grid))
    taken_gib = workers * WORKER_DEVICE_GIB if device.kind == "cuda" else 0.0
    reasons = {s: too_large(s, device, on_grid=s in swept, taken_gib=taken_gib) for s in shapes}
    return [s for s in shapes if not reasons[s]], {s: reason for s, reason in reasons.items() if reason}


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
            history=self.journal.records,
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
    left = [s for s in wanted if any((s, r) not in measured and attempts[s, r] < MAX_ATTEMPTS for r in recipes)]
    if controls.isdisjoint(left):
        controls.update(left[:1])  # every session has its own
    points = [Task(shape, control=shape in controls) for shape in left]
    again = [Task(shape, repeat=True) for shape in repeats if any((shape, r) not in repeated for r in recipes)]
    return points + again


def _share(share: float, count: int) -> int:
    return max(1, round(share * count))


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
