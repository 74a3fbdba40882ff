"""What a sweep still has to measure: the points that lack a number, controls, and repeats that show the spread. Pure.

In: the shapes wanted, a journal's records. Out: `SweepTasks`; and when these are done, those that are measured once
more: to tell numbers from noise, and to show how far two runs differ.
"""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from fp8gate.calibrate.device.kind import NoiseLimits
from fp8gate.calibrate.points.noise import Row, far_from_neighbours
from fp8gate.calibrate.points.point_record import PointRecord
from fp8gate.calibrate.points.setup import Setup
from fp8gate.calibrate.points.task_queue import Task
from fp8gate.filter.contract.bounds import is_small
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import SweepProtocol

MAX_ATTEMPTS = 2  # a point without numbers is tried once more by the next run: memory may have been taken then
CONTROL_SHARE = REPEAT_SHARE = 0.05
MAX_REPEAT_SHARES = 2 / 3, 1 / 3
"""Of the small and of the other points: repeats must not take as long as the sweep itself. Small ones take little."""


class SweepTasks(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be measured, by one process or by many ranks.

    tasks: each is for one device, whichever takes it. repeats: shapes that every device measures, unless it is in
    `repeated` with the shape. stop_at: Unix time.
    """

    setup: Setup
    recipes: tuple[Recipe, ...]
    seed: int
    tasks: tuple[Task, ...]
    repeats: tuple[LinearShape, ...] = ()
    repeated: tuple[tuple[LinearShape, str], ...] = ()
    stop_at: float | None = None

    @property
    def protocols(self) -> dict[Recipe, SweepProtocol]:
        return {recipe: self.setup.protocols[recipe] for recipe in self.recipes}

    def own_tasks(self, measured_on: str) -> list[Task]:
        """What this device measures, whatever the others do."""
        return [Task(shape, repeat=True) for shape in self.repeats if (shape, measured_on) not in self.repeated]

    @property
    def stop_after_s(self) -> float | None:
        return None if self.stop_at is None else self.stop_at - time.time()


def tasks_left(
    setup: Setup,
    wanted: Sequence[LinearShape],
    recipes: Sequence[Recipe],
    records: Sequence[PointRecord],
    seed: int,
    drawn_from: Sequence[LinearShape],
) -> SweepTasks:
    """Shapes that lack a recipe, shapes whose only attempt gave no number, and repeats of a share of `drawn_from`.

    drawn_from: the shapes among which controls and repeats are; every call of a sweep gives the same. All recipes
    asked for are measured at such a shape again, in one session.
    """
    repeated: dict[tuple[LinearShape, str], set[Recipe]] = defaultdict(set)
    for record in (record for record in records if record.repeat):
        repeated[record.shape, record.measured_on].update(record.recipes)
    rng = random.Random(seed)
    controls = set(rng.sample(drawn_from, _share(CONTROL_SHARE, len(drawn_from))))
    repeats = rng.sample(drawn_from, _share(REPEAT_SHARE, len(drawn_from)))
    left = unmeasured(wanted, recipes, records)
    if controls.isdisjoint(left):
        controls.update(left[:1])  # every session has its own
    return SweepTasks(
        setup=setup,
        recipes=tuple(recipes),
        seed=seed,
        tasks=tuple(Task(shape, control=shape in controls) for shape in left),
        repeats=tuple(repeats),
        repeated=tuple(where for where, found in repeated.items() if found.issuperset(recipes)),
    )


def unmeasured(
    shapes: Iterable[LinearShape], recipes: Sequence[Recipe], records: Sequence[PointRecord]
) -> list[LinearShape]:
    """Those that lack a recipe's number and have not been tried MAX_ATTEMPTS times."""
    first = [record for record in records if not record.repeat]
    measured = {(r.shape, recipe) for r in first for recipe in r.recipes if r.status(recipe) == "measured"}
    attempts = Counter((r.shape, recipe) for r in first for recipe in r.recipes)
    return [s for s in shapes if any((s, r) not in measured and attempts[s, r] < MAX_ATTEMPTS for r in recipes)]


def second_looks(
    wanted: Sequence[LinearShape], rows: Mapping[Recipe, Mapping[LinearShape, Row]], limits: NoiseLimits
) -> list[Task]:
    """The points whose numbers only another measurement can tell from noise, in the order of `wanted`.

    They are those that are noise by what is known, those measured once that are far from their neighbours, and with
    `limits.measures_twice` all that were measured once. They are no repeats: those are a sample that shows the spread.
    """
    doubtful: set[LinearShape] = set()
    for by_shape in rows.values():
        doubtful |= {shape for shape, row in by_shape.items() if row.noise}
        suspected = by_shape.keys() if limits.measures_twice else far_from_neighbours(by_shape, limits)
        doubtful |= {shape for shape in suspected if by_shape[shape].measurements == 1}
    return [Task(shape) for shape in wanted if shape in doubtful]


def repeats_for_bounds(
    wanted: Sequence[LinearShape],
    rows: Mapping[Recipe, Mapping[LinearShape, Row]],
    records: Sequence[PointRecord],
    seed: int,
    limits: NoiseLimits,
    asked: Collection[LinearShape] = (),
) -> list[Task]:
    """The repeats that each class of points still lacks, in the order of `wanted`. They are random points of the class.

    asked: shapes that are being repeated, or will be. One repeat measures all recipes. Which class a point is of, only
    its first measurement tells. Repeats of earlier calls count if they were of all recipes, so that a sweep that goes
    on takes no more of them than one that ran through.
    """
    times_us = {
        shape: row.point.bf16_fwd_us + row.point.bf16_bwd_us
        for by_shape in rows.values()
        for shape, row in by_shape.items()
        if row.point.bf16_fwd_us and row.point.bf16_bwd_us
    }
    repeated = {*asked, *repeated_shapes(records, tuple(rows))}
    chosen: set[LinearShape] = set()
    for small, share in zip((True, False), MAX_REPEAT_SHARES, strict=True):
        of_class = sorted(shape for shape in wanted if shape in times_us and is_small(times_us[shape]) is small)
        missing = [shape for shape in of_class if shape not in repeated]
        lacking = min(limits.repeats, int(share * len(of_class))) - (len(of_class) - len(missing))
        random.Random(seed).shuffle(missing)
        chosen.update(missing[: max(0, lacking)])
    return [Task(shape, repeat=True) for shape in wanted if shape in chosen]


def repeated_shapes(records: Iterable[PointRecord], recipes: Sequence[Recipe]) -> set[LinearShape]:
    """The shapes whose repeats are of all these recipes: those of an earlier call may be of others alone."""
    repeated: dict[LinearShape, set[Recipe]] = defaultdict(set)
    for record in records:
        if record.repeat:
            repeated[record.shape].update(record.recipes)
    return {shape for shape, found in repeated.items() if found.issuperset(recipes)}


def _share(share: float, count: int) -> int:
    return max(1, round(share * count))
