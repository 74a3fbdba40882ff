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
from pathlib import Path
from typing import Any

import msgspec
import torch

from fp8gate.calibrate.compile_ahead import CompileAhead
from fp8gate.calibrate.device import describe_device, describe_software
from fp8gate.calibrate.grid import measuring_order, too_large
from fp8gate.calibrate.journal import Journal, Setup
from fp8gate.calibrate.linears import DATA, INDUCTOR
from fp8gate.calibrate.measure import SETTLE_S, DeviceLostError, measure_point
from fp8gate.calibrate.progress import Observer, make_observer
from fp8gate.calibrate.records import PointRecord
from fp8gate.calibrate.timing import CpuTimer, CudaTimer, Timer
from fp8gate.filter.devices import device_slug
from fp8gate.filter.shapes import LinearShape
from fp8gate.filter.table import RECIPES, Grid, Protocol, Recipe, Table, read_table, write_table

ROUNDS = (8, 12, 16, 24, 32)  # 8 is the fewest that give bounds at 99 %
CONFIDENCE = 0.99  # looking after every few rounds with 95 % bounds would give 15 % false decisions at a tie, 4 % so
THRESHOLD = 1.0
TOLERANCE = 0.01
SEED = 0
MAX_ATTEMPTS = 2  # a point without numbers is tried once more by the next run: memory may have been taken then


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a sweep came to. Without tables it was stopped before the end; the same call goes on from there."""

    tables: dict[Path, Table]
    measured: int
    resumed: int
    remaining: int
    capped: dict[LinearShape, str]


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
    compile_workers: int | None = None,
) -> SweepResult:
    """Measure `shapes` for `recipes` and write one table a recipe under `out`.

    grid: the axes the table will state. fresh: put an existing journal aside instead of going on with it.
    stop_after_s: begin no further point after so many seconds, and write no table unless all are done.
    compile_workers: None takes the cores there are less two; without `compile` in the protocol there are none.
    Raises ValueError if no point is left to measure or a table with other points would be replaced, JournalError if
    the journal is in use or damaged, DeviceLostError if the GPU fails for good.
    """
    folder = out / device_slug(setup.device.name)
    wanted = measuring_order(shapes)
    capped = {shape: why for shape in wanted if (why := too_large(shape, setup.device))}
    wanted = [shape for shape in wanted if shape not in capped]
    if not wanted:
        raise ValueError(f"no point to measure: all {len(capped)} were left out, {next(iter(capped.values()), '')}")
    with Journal(folder, setup, fresh=fresh) as journal:
        if not fresh:
            _require_nothing_lost(folder, recipes, wanted, journal.records)
        todo = _todo(wanted, recipes, journal.records)
        protocols = {recipe: setup.protocols[recipe] for recipe in recipes}
        with make_observer(len(todo), protocols) as observer:
            _say_start(observer, journal, len(todo), len(wanted), capped)
            if not any(protocol.compile for protocol in protocols.values()):
                compile_workers = 0
            with CompileAhead(device.type, compile_workers) as ahead:
                ahead.submit(todo, protocols)
                measured = _measure(todo, protocols, device, journal, observer, ahead, stop_after_s)
        tables = {}
        if measured == len(todo):
            tables = _write_tables(folder, grid, recipes, journal, fresh)
        return SweepResult(tables, measured, len(wanted) - len(todo), len(todo) - measured, capped)


def make_table(
    grid: Grid, shapes: Iterable[LinearShape], recipe: Recipe, setup: Setup, records: Sequence[PointRecord]
) -> Table:
    """A recipe's table from a journal's records; where a shape was measured twice, the last with numbers counts.

    `measured_at` is that of its newest record, so that the same measurements give the same file.
    """
    chosen, latest = set(shapes), {}
    for record in (r for r in records if recipe in r.arms and r.shape in chosen):
        if record.shape not in latest or record.status(recipe) == "measured":
            latest[record.shape] = record
    protocol = setup.protocols[recipe]
    return Table(
        recipe=recipe,
        device=setup.device,
        software=setup.software,
        protocol=protocol,
        measured_at=max(r.measured_at for r in latest.values()),
        grid=grid,
        points=tuple(latest[shape].point(recipe, protocol) for shape in sorted(latest)),
    )


def _measure(
    todo: Sequence[LinearShape],
    protocols: dict[Recipe, Protocol],
    device: torch.device,
    journal: Journal,
    observer: Observer,
    ahead: CompileAhead,
    stop_after_s: float | None,
) -> int:
    """Measure and journal point by point; returns how many."""
    deadline = None if stop_after_s is None else time.monotonic() + stop_after_s
    timer: Timer[Any] = CudaTimer(device) if device.type == "cuda" else CpuTimer()
    for done, shape in enumerate(todo):
        if deadline is not None and time.monotonic() > deadline:
            return done
        observer.starting(shape)
        if problem := ahead.wait(shape):
            observer.say(f"{shape}: {problem}")
        torch.manual_seed(SEED)
        try:
            record = measure_point(shape, protocols, timer, device, random.Random(SEED))
        except DeviceLostError as error:
            journal.append(error.args[0])
            raise
        journal.append(record)
        observer.finished(record)
    return len(todo)


def _todo(
    wanted: Sequence[LinearShape], recipes: Sequence[Recipe], records: Sequence[PointRecord]
) -> list[LinearShape]:
    """Shapes that lack a recipe, and those whose only attempt gave no number, whatever was wrong that time.

    All recipes asked for are measured there again, in one session.
    """
    measured = {(r.shape, recipe) for r in records for recipe in r.recipes if r.status(recipe) == "measured"}
    attempts = Counter((r.shape, recipe) for r in records for recipe in r.recipes)
    return [
        shape
        for shape in wanted
        if any((shape, r) not in measured and attempts[shape, r] < MAX_ATTEMPTS for r in recipes)
    ]


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
        shapes = [record.shape for record in journal.records]
        table = make_table(grid, shapes, recipe, journal.setup, journal.records)
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
    observer.say(f"{device.name}: {todo} of {wanted} points to measure, journal {journal.path}")
    if journal.set_aside:
        observer.say(f"the earlier journal is kept as {journal.set_aside}")
    for other in journal.others():
        observer.say(f"{other} is of other software, protocol or device: not used")
    if capped:
        observer.say(f"{len(capped)} points left out, too large to measure here:")
        for shape, why in sorted(capped.items()):
            observer.say(f"  {shape}: {why}")
