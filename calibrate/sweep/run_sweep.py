"""The sweep: measure every point that is not yet in the journal, then write the tables from the journal.

In: shapes, recipes, a device, a folder. Out: `<folder>/<device slug>/<recipe>.yaml`.
Try it: fp8gate calibrate --grid quick --out /tmp/tables
"""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fp8gate.calibrate.arms.linear import DATA
from fp8gate.calibrate.device.capacity import WORKER_DEVICE_GIB, useful_workers
from fp8gate.calibrate.device.description import describe_device, describe_software, device_identity
from fp8gate.calibrate.device.timing_lock import timing_lock_file
from fp8gate.calibrate.device.watch import DeviceLock
from fp8gate.calibrate.points.measure_point import POINT_PAUSE_S, POINT_RUN_S, POINT_SETTLE_S, DeviceLostError
from fp8gate.calibrate.points.point_worker import Job
from fp8gate.calibrate.points.task_queue import Task, TaskQueue
from fp8gate.calibrate.ranks.rank_store import SweepTasks
from fp8gate.calibrate.ranks.rank_sweep import Ranks, lead
from fp8gate.calibrate.sweep.grid import grid_shapes, measuring_order, too_large
from fp8gate.calibrate.sweep.journal import Journal, Setup
from fp8gate.calibrate.sweep.progress import Observer, make_observer
from fp8gate.calibrate.sweep.session import JournalLedger, SessionResult, SweepSession
from fp8gate.calibrate.sweep.sweep_report import SweepReport, make_sweep_report
from fp8gate.calibrate.sweep.table_writing import require_nothing_lost, write_tables
from fp8gate.filter.contract.devices import device_slug
from fp8gate.filter.contract.recipes import RECIPES, Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Device, Grid, SweepProtocol, Table

ROUNDS = (10, 30)  # 8 would give bounds at 99 %, but those of the extremes
CONFIDENCE = 0.99
THRESHOLD = 1.0
TOLERANCE = 0.01
NEAR, NEAR_S = 0.03, 1.0
"""Under the power limit the times of two short runs differ by 1.5 % (standard deviation), those of two whole seconds by
0.8 %: what lies nearer to the threshold than twice the first runs for the second (LOG.md, 2026-11-25)."""
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
    report: SweepReport
    remaining: int
    capped: dict[LinearShape, str]
    off: dict[LinearShape, float]


def make_setup(device: torch.device) -> Setup:
    """The set-up for production settings: compiled under CUDA graphs on a GPU, eager on a CPU."""
    on_gpu = device.type == "cuda"
    protocols = {
        recipe: SweepProtocol(
            timer="cuda_graphs" if on_gpu else "wall_clock",
            compile=on_gpu,
            inductor=RECIPES[recipe].inductor if on_gpu else {},
            bf16="eager",
            l2="cold",
            data=DATA,
            settle_s=POINT_SETTLE_S,
            run_s=POINT_RUN_S,
            pause_s=POINT_PAUSE_S,
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
    ranks: Ranks | None = None,
) -> SweepResult:
    """Measure `shapes` for `recipes` and write one table a recipe under `out`.

    grid: the axes the table will state. fresh: put an existing journal aside instead of going on with it.
    stop_after_s: begin no further point after so many seconds, and write no table unless all are done.
    workers: processes that compile and measure, 0 for this one alone; None: as the cores and the protocol allow.
    seed: of the order of points, of which are controls and repeats, and of the data. ranks: the others that measure
    (`take_part`), if this is rank 0 of several.
    Raises ValueError if no point is left to measure or a table with other points would be replaced, JournalError if
    the journal is in use or damaged, DeviceBusyError if another sweep has the device, DeviceLostError if the GPU
    fails for good, WorkersDiedError if no worker can start.
    """
    start = time.monotonic()
    folder = out / device_slug(setup.device.name)
    protocols = {recipe: setup.protocols[recipe] for recipe in recipes}
    world, local_world = (ranks.place.world, ranks.place.local_world) if ranks else (1, 1)
    if workers is None:
        workers = useful_workers(setup.device, protocols, local_world)
    wanted, capped = _affordable(grid, measuring_order(shapes, seed), setup.device, workers)
    if not wanted:
        raise ValueError(f"no point to measure: all {len(capped)} were left out, {next(iter(capped.values()), '')}")
    with DeviceLock(device), Journal(folder, setup, fresh=fresh) as journal:
        if not fresh:
            require_nothing_lost(folder, recipes, wanted, journal.records)
        plan = _plan(wanted, recipes, journal, seed)
        todo = len(plan.tasks) + len(plan.own_tasks(device_identity(device))) * world
        with make_observer(todo, protocols) as observer:
            _say_start(observer, journal, todo, len(wanted), capped)
            book = JournalLedger(journal, observer)
            if ranks:
                part = lead(ranks, plan, book, device, workers, stop_after_s)
            else:
                part = _measure_alone(plan, book, device, workers, stop_after_s)
        tables = {}
        if not part.remaining and not book.off:
            tables = write_tables(folder, grid, recipes, journal, fresh)
        report = make_sweep_report(
            book.measured,
            protocols,
            part,
            history=journal.records,
            resumed=len(wanted) - len(plan.tasks),
            capped=len(capped),
            total_s=time.monotonic() - start,
        )
        return SweepResult(tables, report, part.remaining, capped, book.off)


def _measure_alone(
    plan: SweepTasks, book: JournalLedger, device: torch.device, workers: int, stop_after_s: float | None
) -> SessionResult:
    """Raises DeviceLostError, its record kept."""
    measured_on = device_identity(device)
    tasks = [*plan.tasks, *plan.own_tasks(measured_on)]
    with timing_lock_file() as quiet:
        job = Job(device, plan.protocols, plan.seed, quiet, measured_on)
        run = SweepSession(job, TaskQueue(tasks), book, stop_after_s=stop_after_s)
        try:
            run.measure(min(workers, len(tasks)))
        except DeviceLostError as error:
            book.keep(Task(error.args[0].shape), error.args[0])
            raise
    return run.part(remaining=len(tasks) - len(book.measured) - len(book.off))


def _affordable(
    grid: Grid, shapes: Sequence[LinearShape], device: Device, workers: int
) -> tuple[list[LinearShape], dict[LinearShape, str]]:
    """The shapes that are measured, and those left out with the reason; each worker keeps some of a GPU's memory."""
    swept = set(grid_shapes(grid))
    taken_gib = workers * WORKER_DEVICE_GIB if device.kind == "cuda" else 0.0
    reasons = {s: too_large(s, device, on_grid=s in swept, taken_gib=taken_gib) for s in shapes}
    return [s for s in shapes if not reasons[s]], {s: reason for s, reason in reasons.items() if reason}


def _plan(
    wanted: Sequence[LinearShape],
    recipes: Sequence[Recipe],
    journal: Journal,
    seed: int,
) -> SweepTasks:
    """Shapes that lack a recipe and those whose only attempt gave no number; then repeats of a share of all.

    All recipes asked for are measured there again, in one session.
    """
    first = [r for r in journal.records if not r.repeat]
    measured = {(r.shape, recipe) for r in first for recipe in r.recipes if r.status(recipe) == "measured"}
    attempts = Counter((r.shape, recipe) for r in first for recipe in r.recipes)
    repeated: dict[tuple[LinearShape, str], set[Recipe]] = defaultdict(set)
    for record in (r for r in journal.records if r.repeat):
        repeated[record.shape, record.measured_on].update(record.recipes)
    rng = random.Random(seed)
    controls = set(rng.sample(wanted, _share(CONTROL_SHARE, len(wanted))))
    repeats = rng.sample(wanted, _share(REPEAT_SHARE, len(wanted)))
    left = [s for s in wanted if any((s, r) not in measured and attempts[s, r] < MAX_ATTEMPTS for r in recipes)]
    if controls.isdisjoint(left):
        controls.update(left[:1])  # every session has its own
    return SweepTasks(
        setup=journal.setup,
        recipes=tuple(recipes),
        seed=seed,
        tasks=tuple(Task(shape, control=shape in controls) for shape in left),
        repeats=tuple(repeats),
        repeated=tuple(where for where, found in repeated.items() if found.issuperset(recipes)),
    )


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
