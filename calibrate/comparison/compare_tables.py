"""What changed between two tables of one recipe: another release, another GPU, last month. Pure.

In: two tables. Out: a `Comparison`: the points that changed by more than chance, the decisions that flip, how far all
points have shifted together, and what this means for models.

Two honest sweeps differ too: at each point by what the bounds of both allow, mostly. Beyond that are a few points by
chance, so a finding is a point that changed far beyond its bounds, or more points beyond theirs than chance allows.
Bounds of older tables cover one run only: there a point changed if it exceeds the bounds and a multiple of the spread
that the tables state. Where chance allows so much that a change which matters would not show, a comparison without
findings says nothing: `can_tell` is False then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from fp8gate.calibrate.comparison.point_change import PointChange, compare_points, most_by_chance
from fp8gate.calibrate.timing.statistics import Interval, ratio_of
from fp8gate.filter.contract.recipes import SEE_BOTH_CASTS, Variant
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import WITH_NUMBERS, Point, Table, TableError
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP
from fp8gate.filter.decision.lookup import Lookup
from fp8gate.filter.decision.shared_input import decide_linear, input_kind
from fp8gate.filter.model.described_model import role_shape
from fp8gate.filter.model.model_config import ModelConfig, linear_roles
from fp8gate.filter.model.parallel import Shards

SHIFT = 0.03
"""How far all speedups together may shift by chance. Two H200 of one machine differ by up to 2.2 % (the median over the
points of a size, LOG.md)."""
FINDABLE = 0.10
"""A change of all speedups together must show if it is as large. It would flip 16 to 31 of the 407 decisions of an H200
table; two honest sweeps flip 2 to 8."""
FINDABLE_AT_A_POINT = 0.25
"""A change of a single speedup must show at half of the points if it is as large. Between two H200 sweeps chance allows
the median point 14, 18 and 20 % (rowwise, rowwise_with_gw_hp, tensorwise), so no less can be asked of honest tables."""
CONFIDENCE = 0.99
MIN_POINTS = 8  # the fewest that give bounds at that confidence


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChange:
    """The time of all linears of a model for one microbatch, each table deciding for itself.

    stale_us: the time by the new table if the old one decides. flipped: the roles that the tables decide differently.
    """

    name: str
    before_us: float
    after_us: float
    stale_us: float
    flipped: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two tables of one recipe. points: the shapes that have numbers in both.

    only_before, only_after: how many shapes just one table has. lost: the shapes whose numbers are missing in the new
    table. shift: after / before over all points, with its bounds; None if there are too few points.
    shifts: the same for the points of each number of tokens that has enough of them.
    """

    variant: Variant
    before: Table
    after: Table
    points: tuple[PointChange, ...]
    only_before: int
    only_after: int
    lost: tuple[LinearShape, ...]
    shift: Interval | None
    shifts: Mapping[int, Interval]
    models: tuple[ModelChange, ...]

    @property
    def changed(self) -> list[PointChange]:
        """The points that changed beyond chance, the largest change first."""
        found = [point for point in self.points if point.is_beyond_chance]
        return sorted(found, key=lambda point: -abs(math.log(1 + point.change)))

    @property
    def beyond_bounds(self) -> list[PointChange]:
        """The points that differ by more than the bounds of both allow. A few do by chance."""
        return [point for point in self.points if point.is_beyond_bounds]

    @property
    def has_many_beyond_bounds(self) -> bool:
        return len(self.beyond_bounds) > most_by_chance(len(self.points))

    @property
    def flips(self) -> list[PointChange]:
        """The points whose decision changes, whether by chance or not."""
        return [point for point in self.points if point.flips]

    @property
    def has_shifted(self) -> bool:
        return self.shift is not None and _is_beyond(self.shift)

    @property
    def shifted_tokens(self) -> dict[int, Interval]:
        """The numbers of tokens whose points have shifted together."""
        return {m: shift for m, shift in self.shifts.items() if _is_beyond(shift)}

    @property
    def has_findings(self) -> bool:
        found = self.changed or self.lost or self.has_shifted or self.shifted_tokens
        return bool(found) or self.has_many_beyond_bounds

    @property
    def allowance(self) -> float | None:
        """How far ln(after / before) of the median point may be from 0 by chance. None if there is no point."""
        return median(point.allowed for point in self.points) if self.points else None

    @property
    def finds_shift(self) -> bool:
        """Whether a change of all speedups by FINDABLE would show: in all together, or at half of the points."""
        is_narrow = self.shift is not None and _width(self.shift) <= math.log((1 + FINDABLE) / (1 + SHIFT))
        return is_narrow or self._shows(FINDABLE)

    @property
    def finds_single_changes(self) -> bool:
        """Whether a change of one speedup by FINDABLE_AT_A_POINT would show at half of the points."""
        return self._shows(FINDABLE_AT_A_POINT)

    @property
    def can_tell(self) -> bool:
        """Whether the absence of findings says that the tables agree."""
        return self.finds_shift and self.finds_single_changes

    def _shows(self, change: float) -> bool:
        return self.allowance is not None and self.allowance <= math.log(1 + change)


def compare_tables(
    before: Table,
    after: Table,
    *,
    min_speedup: float,
    models: Iterable[tuple[str, ModelConfig, Shards]] = (),
) -> Comparison:
    """Compare the points that both measured.

    min_speedup: from which a point's decision counts as float8; if it is not the default, models are decided by it too,
    else by the filter's rule. models: for each of them a name, a config and how it is divided.
    Raises TableError for tables of different recipes or casts, or without a common point.
    """
    if before.recipe != after.recipe:
        raise TableError(f"recipe: {before.recipe} and {after.recipe}; only tables of one recipe can be compared")
    if before.variant != after.variant:
        casts = f"{before.protocol.casts} and {after.protocol.casts}"
        raise TableError(f"protocol.casts: {casts}; only tables of the same casts can be compared: {SEE_BOTH_CASTS}")
    old, new = ({point.shape: point for point in table.points} for table in (before, after))
    common = sorted(old.keys() & new.keys())
    if not common:
        raise TableError(f"{before.recipe}: the tables have no point in common")
    lookups = Lookup(before), Lookup(after)
    pairs = [(old[shape], new[shape]) for shape in common]
    parts = before.protocol, after.protocol
    asked = None if min_speedup == DEFAULT_MIN_SPEEDUP else min_speedup
    points = tuple(compare_points(a, b, parts, min_speedup) for a, b in pairs if _has_numbers(a) and _has_numbers(b))
    return Comparison(
        variant=before.variant,
        before=before,
        after=after,
        points=points,
        only_before=len(old.keys() - new.keys()),
        only_after=len(new.keys() - old.keys()),
        lost=tuple(a.shape for a, b in pairs if _has_numbers(a) and not _has_numbers(b)),
        shift=_shift(points),
        shifts=_shifts(points),
        models=tuple(_compare_model(name, config, shards, lookups, asked) for name, config, shards in models),
    )


def shift_of(log_changes: Sequence[float]) -> Interval | None:
    """The factor that all points have in common, by Hodges and Lehmann's estimate. None for fewer than MIN_POINTS."""
    if len(log_changes) < MIN_POINTS:
        return None
    return ratio_of(log_changes, confidence=CONFIDENCE)


def _shift(points: Iterable[PointChange]) -> Interval | None:
    return shift_of([math.log(1 + point.change) for point in points])


def _shifts(points: Sequence[PointChange]) -> dict[int, Interval]:
    by_tokens = {m: _shift(p for p in points if p.shape.m == m) for m in sorted({p.shape.m for p in points})}
    return {m: shift for m, shift in by_tokens.items() if shift}


def _is_beyond(shift: Interval) -> bool:
    return shift.low > 1 + SHIFT or shift.high < 1 / (1 + SHIFT)


def _width(shift: Interval) -> float:
    """The logarithm of the wider side of the bounds."""
    return math.log(max(shift.high / shift.estimate, shift.estimate / shift.low))


def _compare_model(
    name: str, config: ModelConfig, shards: Shards, lookups: tuple[Lookup, Lookup], min_speedup: float | None
) -> ModelChange:
    """What both tables say of a model whose linears the filter chooses. min_speedup: as the filter takes it."""
    old, new = lookups
    before_us = after_us = stale_us = 0.0
    flipped = []
    for linear in linear_roles(config):
        shape = role_shape(linear, shards)
        kind = input_kind(linear.name)
        then, now = (decide_linear(kind, shape, lookup, min_speedup=min_speedup).convert for lookup in (old, new))
        old_times, new_times = old(shape), new(shape)
        if old_times is None or new_times is None:
            raise TableError(f"{old.table.recipe}: a table without any number tells nothing of {name}")
        before_us += linear.count * (old_times.fp8_us if then else old_times.bf16_us)
        after_us += linear.count * (new_times.fp8_us if now else new_times.bf16_us)
        stale_us += linear.count * (new_times.fp8_us if then else new_times.bf16_us)
        if then != now:
            flipped.append(linear.role or linear.fqn)
    return ModelChange(name=name, before_us=before_us, after_us=after_us, stale_us=stale_us, flipped=tuple(flipped))


def _has_numbers(point: Point) -> bool:
    return point.status in WITH_NUMBERS
