"""What a sweep measures after its first tasks, as their numbers come in.

In: the records that are there. Out: more tasks: the points of a refined grid that are worth it, then the repeats that
tell how far two runs differ and the points with fewer tokens, and at the end second looks at what may be noise.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fp8gate.calibrate.device.kind import NoiseLimits
from fp8gate.calibrate.device.registry import KINDS
from fp8gate.calibrate.grid.refinement import Refinement
from fp8gate.calibrate.grid.unaligned import FEWER, MAX_SHARE, unaligned_shapes, with_fewer_tokens
from fp8gate.calibrate.points.noise import Row, mostly_disturbed, repeats_disagree
from fp8gate.calibrate.points.point_record import PointRecord
from fp8gate.calibrate.points.task_queue import Task
from fp8gate.calibrate.sweep.session import JournalLedger
from fp8gate.calibrate.sweep.sweep_tasks import SweepTasks, repeats_for_bounds, second_looks, unmeasured
from fp8gate.calibrate.sweep.table_writing import rows_of
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import TOKEN_TILE, LinearShape
from fp8gate.filter.contract.table import Grid, SweepProtocol

MAX_LOOKS = 2
"""A second measurement that contradicts the first does not tell which of them is wrong; a third one does."""


class Agenda:
    """The tasks that come after `tasks`, whose shapes are `wanted`.

    grid: of its points, some are measured with fewer tokens. refinement: None if every point is measured. repeats:
    whether repeats can be measured, by a process that has not measured the point.
    """

    def __init__(
        self,
        tasks: SweepTasks,
        wanted: Sequence[LinearShape],
        refinement: Refinement | None,
        ledger: JournalLedger,
        *,
        grid: Grid,
        repeats: bool,
    ) -> None:
        self._wanted = list(wanted)
        self._again = {task.shape for task in tasks.tasks}
        self._tasks, self._refinement, self._ledger = tasks, refinement, ledger
        self._may_repeat = self._may_repeat_early = repeats
        self._repeated: set[LinearShape] = set()
        self._grid = grid
        self._unaligned: set[LinearShape] = set()
        self._looks = 0
        defaults = KINDS[tasks.setup.device.kind].defaults
        self._limits: NoiseLimits = defaults.noise
        self._unaligned_points = defaults.unaligned_points
        self._asked_at = -1

    @property
    def before(self) -> int:
        """How many measurements of this sweep earlier calls took, without those that this call takes again."""
        records = self._ledger.journal.records
        earlier = records[: len(records) - len(self._ledger.measured)]
        wanted = {*self._wanted, *map(with_fewer_tokens, self._wanted)}
        return sum(record.shape in wanted and self._stands(record) for record in earlier)

    def _stands(self, record: PointRecord) -> bool:
        if set(record.recipes).isdisjoint(self._tasks.recipes):
            return False
        if record.repeat and record.shape in self._tasks.repeats:
            return (record.shape, record.measured_on) in self._tasks.repeated
        return record.repeat or record.shape not in self._again

    @property
    def undecided(self) -> int:
        """How many points of a refined grid may still be due."""
        return self._refinement.undecided if self._refinement else 0

    @property
    def at_most(self) -> int:
        """How many tasks may come, second looks aside."""
        repeats = 2 * self._limits.repeats + len(self._tasks.recipes) * self._unaligned_points
        return self.undecided + (repeats if self._may_repeat else 0)

    def more(self) -> list[Task]:
        """What is to be measured now that nothing else waits; none while that hangs on what is being measured.

        It ends early where bf16 differs from itself, as no table will be written.
        """
        records = self._ledger.journal.records
        if self._ledger.off or len(records) == self._asked_at:
            return []
        found = self._refined(records)
        if not found and not self.undecided and self._may_repeat:
            self._may_repeat = self._ledger.left > 0  # what is being measured now may be repeated too
            found = self._repeats(records, self._limits.repeats) + self._with_fewer_tokens(records)
        if not found and not self._ledger.left:
            found = self._second_looks(records)
        if not found:
            self._asked_at = len(records)
        self._ledger.ask(len(found), self.undecided)
        return found

    def _refined(self, records: Sequence[PointRecord]) -> list[Task]:
        if not self.undecided:
            return []
        assert self._refinement
        protocols = self._tasks.protocols
        tried: defaultdict[LinearShape, set[Recipe]] = defaultdict(set)
        numbers: defaultdict[LinearShape, dict[Recipe, float]] = defaultdict(dict)
        for record in records:  # the first numbers count: with repeats, a sweep that goes on would choose other points
            tried[record.shape].update(record.recipes)
            numbers[record.shape] = _speedups(record, protocols) | numbers[record.shape]
        due = self._refinement.due({s: numbers[s] for s, recipes in tried.items() if recipes.issuperset(protocols)})
        left = unmeasured(due, self._tasks.recipes, records)
        tasks = [Task(shape) for shape in left]
        if tasks and self._may_repeat_early:
            self._may_repeat_early = False
            tasks += self._repeats(records, self._limits.repeats // 2)
            random.Random(self._tasks.seed).shuffle(tasks)
        self._wanted += due
        self._again.update(left)
        return tasks

    def _repeats(self, records: Sequence[PointRecord], of_each_class: int) -> list[Task]:
        """Half of them come among the refined points: the device measures them while those compile."""
        limits, rows = replace(self._limits, repeats=of_each_class), self._rows(records)
        repeats = repeats_for_bounds(self._wanted, rows, records, self._tasks.seed, limits, self._repeated)
        self._repeated.update(task.shape for task in repeats)
        if repeats:
            self._ledger.say(f"{len(repeats)} points are to be repeated, to tell how far two runs differ")
        return repeats

    def _with_fewer_tokens(self, records: Sequence[PointRecord]) -> list[Task]:
        """They are repeats, as they give no row. Those of earlier calls count."""
        on_grid = {s for s in self._wanted if s.m in self._grid.m and s.k in self._grid.k and s.n in self._grid.n}
        if self._unaligned_points > MAX_SHARE * len(on_grid):
            return []
        speedups = {
            recipe: {s: row.point.speedup for s, row in rows.items() if s in on_grid and row.point.speedup}
            for recipe, rows in self._rows(records).items()
        }
        self._unaligned |= {record.shape for record in records if record.repeat}
        found = unaligned_shapes(speedups, self._unaligned, count=self._unaligned_points, seed=self._tasks.seed)
        self._unaligned.update(found)
        if found:
            self._ledger.say(
                f"{len(found)} points are to be measured with {FEWER} tokens fewer, to tell how much slower float8 is "
                f"where the tokens are no multiple of {TOKEN_TILE}"
            )
        return [Task(shape, repeat=True) for shape in found]

    def _rows(self, records: Sequence[PointRecord]) -> dict[Recipe, dict[LinearShape, Row]]:
        return {recipe: rows_of(recipe, self._tasks.setup, records) for recipe in self._tasks.recipes}

    def _second_looks(self, records: Sequence[PointRecord]) -> list[Task]:
        """All points where the repeats of a share disagree. None on a machine so busy that they would be noise too."""
        if self._looks == MAX_LOOKS:
            return []
        rows = self._rows(records)
        if self._looks and mostly_disturbed(rows.values()):
            return []
        if not self._looks and repeats_disagree(rows.values()):
            self._limits = replace(self._limits, measures_twice=True)
        self._looks += 1
        looks = second_looks(self._wanted, rows, self._limits)
        if looks:
            self._ledger.say(f"{len(looks)} points are measured again, to tell numbers from noise")
        return looks


def _speedups(record: PointRecord, protocols: Mapping[Recipe, SweepProtocol]) -> dict[Recipe, float]:
    measured = [r for r in protocols if r in record.arms and record.status(r) == "measured"]
    times = {recipe: record.times_us(recipe, protocols[recipe]) for recipe in measured}
    return {recipe: sum(us[:2]) / sum(us[2:]) for recipe, us in times.items()}
