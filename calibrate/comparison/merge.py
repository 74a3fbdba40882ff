"""Several tables of the same device, software and protocol become one: sweeps of several days, or of a job array. Pure.

In: tables. Out: one table with every point of all of them. The order in which they are given does not matter. Where
several tables have a point, its speedup is the weighted mean of theirs on the scale of ln(speedup), with weights
1 / variance from their bounds. Bounds for another sweep say by how much that differs from this one, so those of the
mean of n are sqrt((n + 1) / 2) times as wide as bounds of the mean alone. Where the tables differ by more than their
bounds say, the merged bounds cover all of them, and where that makes them too wide, the point is noise. What boards
differ by does not become less with more sweeps, as these may be of one board: the bounds are combined without it, and
it is added to the merged ones. A table made of an incomplete one is incomplete. The header states every sweep, the
widest bounds, those of a point that only one table has, and the mean factor for unaligned tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist

import msgspec

from fp8gate.calibrate.device.registry import KINDS
from fp8gate.calibrate.grid.grid import union
from fp8gate.calibrate.grid.unaligned import DIGITS
from fp8gate.calibrate.points.bounds import narrowed, widened
from fp8gate.calibrate.points.point_record import make_point
from fp8gate.calibrate.timing.statistics import Interval
from fp8gate.filter.contract.bounds import COVERAGE, Bounds, RunBounds, Spread, Unaligned
from fp8gate.filter.contract.merged_sweep import MergedSweep
from fp8gate.filter.contract.recipes import SEE_BOTH_CASTS
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import (
    WITH_NUMBERS,
    EstimateKind,
    Incomplete,
    Point,
    Status,
    SweepProtocol,
    Table,
    TableError,
    format_table,
)
from fp8gate.filter.ranks.agreement import digest_of

ROUNDING = 1e-4  # of ln(speedup): tables keep 4 digits, so bounds that coincide do not mean that nothing varied
NO_NUMBERS: tuple[Status, ...] = (
    "failed",
    "noisy",
    "unstable",
    "out_of_memory",
)  # the first of these that a table has counts
Row = Sequence[float]  # a point's seven numbers, in the order of the table's columns
OWN_FIELDS = {
    "spread",
    "controls",
    "devices",
    "between",
    "bounds",
    "unaligned",
}  # a protocol's results, which differ from sweep to sweep


def merge_tables(tables: Mapping[str, Table]) -> Table:
    """Combine tables, given by the names (files) that errors show.

    Raises TableError if there are fewer than two, if recipe, device, software or protocol differ, or if two of them
    have the same sweep.
    """
    if len(tables) < 2:
        raise TableError(f"merge: expected two tables or more, got {len(tables)}")
    first_name, first = next(iter(tables.items()))
    for name, table in tables.items():
        if difference := _difference(first, table):
            kind = "only tables of one kind can be merged"
            raise TableError(f"{name}: {difference} in {first_name}; {kind}{_instead(first, table)}")
    ordered = sorted(tables.values(), key=format_table)  # so that no sum depends on the order given
    by_shape: dict[LinearShape, list[Point]] = defaultdict(list)
    for table in ordered:
        for point in table.points:
            by_shape[point.shape].append(point)
    width = KINDS[first.device.kind].defaults.noise.width
    protocol = _merged_protocol([table.protocol for table in ordered])
    return msgspec.structs.replace(
        first,
        protocol=protocol,
        measured_at=max(table.measured_at for table in ordered),
        merged_from=_sweeps(tables),
        incomplete=_incomplete(ordered),
        grid=union(*(table.grid for table in ordered)),
        points=tuple(combine_points(by_shape[shape], protocol, width) for shape in sorted(by_shape)),
    )


def _sweeps(tables: Mapping[str, Table]) -> tuple[MergedSweep, ...]:
    """Those of all tables, the oldest first. A table that is merged itself has several."""
    found: dict[MergedSweep, str] = {}
    for name, table in tables.items():
        own = MergedSweep(measured_at=table.measured_at, digest=digest_of(format_table(table)))
        for sweep in table.merged_from or (own,):
            if sweep in found:
                raise TableError(f"{name}: expected each sweep once; that of {sweep} is in {found[sweep]} too")
            found[sweep] = name
    return tuple(sorted(found, key=lambda sweep: (sweep.measured_at, sweep.digest)))


def _incomplete(tables: Sequence[Table]) -> Incomplete | None:
    """That of all stopped sweeps together. What they lack may be in the other tables, which nobody can tell."""
    found = [table.incomplete for table in tables if table.incomplete]
    if not found:
        return None
    return Incomplete(measured=sum(one.measured for one in found), of=sum(one.of for one in found))


def combine_points(points: Sequence[Point], protocol: SweepProtocol, width: float) -> Point:
    """One point from several of the same shape. Those without numbers only count if none has any.

    width: from which bounds on, high / low, several that disagree are noise, beside what differs from run to run.
    """
    with_numbers = [point for point in points if point.status in WITH_NUMBERS]
    if not with_numbers:
        return min(points, key=lambda point: NO_NUMBERS.index(point.status))
    if len(with_numbers) == 1:
        return with_numbers[0]
    bounds = protocol.bounds or Bounds()
    rows = [_without_board(point, bounds) for point in with_numbers]
    z = NormalDist().inv_cdf((1 + (COVERAGE if protocol.bounds else protocol.confidence)) / 2)
    sigmas = [max((math.log(high) - math.log(low)) / 2 / z, ROUNDING) for *_, low, high in rows]
    weights = [1 / sigma**2 for sigma in sigmas]
    times_us = _combined_times(rows, weights, protocol.estimate)
    bf16_us, fp8_us = sum(times_us[:2]), sum(times_us[2:])
    of_mean = _combined_speedup(rows, weights, z, protocol)
    speedup = widened(of_mean, bounds.between_boards(bf16_us, fp8_us))
    shape = with_numbers[0].shape
    if speedup.high > width * math.exp(sum(bounds.between_runs(bf16_us, fp8_us))) * speedup.low:
        return Point(shape.m, shape.k, shape.n, *(None,) * 7, "noisy")
    return make_point(shape, times_us, speedup, protocol)


def _without_board(point: Point, bounds: Bounds) -> Row:
    """The point's numbers, its bounds without what boards differ by."""
    *times_us, speedup, low, high = (number for number in point.numbers if number)
    alike = narrowed(Interval(speedup, low, high), bounds.between_boards(*point.total_us))
    return [*times_us, speedup, alike.low, alike.high]


def _combined_speedup(rows: Sequence[Row], weights: Sequence[float], z: float, protocol: SweepProtocol) -> Interval:
    """The mean speedup with bounds for another sweep, where the rows have such, else with bounds of the mean."""
    logs = [_log_speedup(row, protocol.estimate) for row in rows]
    mean = _weighted_mean(logs, weights)
    half = z / math.sqrt(sum(weights)) * (math.sqrt((len(rows) + 1) / 2) if protocol.bounds else 1.0)
    low, high = mean - half, mean + half
    chi_squared = sum(w * (log - mean) ** 2 for w, log in zip(weights, logs, strict=True))
    if chi_squared > len(logs) - 1:
        low = min(mean, *(math.log(row[5]) for row in rows))
        high = max(mean, *(math.log(row[6]) for row in rows))
    return Interval(math.exp(mean), math.exp(low), math.exp(high))


def _log_speedup(row: Row, estimate: EstimateKind) -> float:
    """ln of the row's speedup.

    If that is the quotient of the row's times, it is computed from them, so that the merged row agrees with its times.
    """
    bf16_fwd_us, bf16_bwd_us, fp8_fwd_us, fp8_bwd_us, speedup, *_ = row
    if estimate == "paired_rounds":
        return math.log(speedup)
    return math.log((bf16_fwd_us + bf16_bwd_us) / (fp8_fwd_us + fp8_bwd_us))


def _combined_times(rows: Sequence[Row], weights: Sequence[float], estimate: EstimateKind) -> list[float]:
    """bf16 forward and backward, float8 forward and backward, in microseconds."""
    if estimate == "paired_rounds":
        return [_geometric_mean(column, weights) for column in list(zip(*rows, strict=True))[:4]]
    bf16, fp8 = ([(row[i], row[i + 1]) for row in rows] for i in (0, 2))
    return [*_combined_arm(bf16, weights), *_combined_arm(fp8, weights)]


def _combined_arm(times_us: Sequence[tuple[float, float]], weights: Sequence[float]) -> tuple[float, float]:
    """An arm's forward and backward time.

    Their sum is the geometric mean of the sums, so that the quotient of two arms is the mean of the quotients, in ln.
    """
    total_us = _geometric_mean([forward + backward for forward, backward in times_us], weights)
    share = _weighted_mean([forward / (forward + backward) for forward, backward in times_us], weights)
    return total_us * share, total_us * (1 - share)


def _geometric_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return math.exp(_weighted_mean([math.log(value) for value in values], weights))


def _merged_protocol(protocols: Sequence[SweepProtocol]) -> SweepProtocol:
    return msgspec.structs.replace(
        protocols[0],
        spread=_pooled(protocol.spread for protocol in protocols),
        controls=_pooled(protocol.controls for protocol in protocols),
        devices=max(protocol.devices for protocol in protocols),
        between=_pooled(protocol.between for protocol in protocols),
        bounds=_widest_bounds([protocol.bounds for protocol in protocols if protocol.bounds]),
        unaligned=_mean_factor([protocol.unaligned for protocol in protocols if protocol.unaligned]),
    )


def _widest_bounds(bounds: Sequence[Bounds]) -> Bounds | None:
    small, large = (
        _widest([part for part in parts if part])
        for parts in ([one.below_120_us for one in bounds], [one.from_120_us for one in bounds])
    )
    return Bounds(below_120_us=small, from_120_us=large, board_us=bounds[0].board_us) if bounds else None


def _widest(parts: Sequence[RunBounds]) -> RunBounds | None:
    if not parts:
        return None
    return RunBounds(
        coverage=min(part.coverage for part in parts),
        within=max(part.within for part in parts),
        between=max(part.between for part in parts),
        repeats=sum(part.repeats for part in parts),
    )


def _mean_factor(found: Sequence[Unaligned]) -> Unaligned | None:
    """The geometric mean, weighted by points."""
    if not found:
        return None
    points = [one.points for one in found]
    return Unaligned(points=sum(points), factor=round(_geometric_mean([one.factor for one in found], points), DIGITS))


def _weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)


def _difference(one: Table, other: Table) -> str:
    """The first field in which two tables differ: "software.torch is 2.13.0, but 2.11.0"; "" if there is none."""
    if one.recipe != other.recipe:
        return f"recipe is {other.recipe}, but {one.recipe}"
    for part in ("device", "software", "protocol"):
        ours, theirs = getattr(one, part), getattr(other, part)
        for field in sorted({*ours.__struct_fields__} - OWN_FIELDS):
            if getattr(ours, field) != getattr(theirs, field):
                return f"{part}.{field} is {getattr(theirs, field)}, but {getattr(ours, field)}"
    ours, theirs = ("there" if table.protocol.bounds else "missing" for table in (one, other))
    if ours != theirs:  # such bounds are of different widths, which are no weights then
        return f"protocol.bounds is {theirs}, but {ours}"
    ours_us, theirs_us = (table.protocol.bounds and table.protocol.bounds.board_us for table in (one, other))
    if ours_us != theirs_us:
        return f"protocol.bounds.board_us is {theirs_us or 'missing'}, but {ours_us or 'missing'}"
    return ""


def _instead(one: Table, other: Table) -> str:
    """What can be done with two tables that cannot be merged: those of two recipes cannot be compared either."""
    if one.recipe != other.recipe:
        return ""
    return ", and fp8gate diff compares others" if one.variant == other.variant else f": {SEE_BOTH_CASTS}"


def _pooled(spreads: Iterable[Spread | None]) -> Spread | None:
    """The spread of all tables' points together, as far as their quantiles tell it.

    The median is the mean of the medians, weighted by points; the other two are the largest of theirs.
    """
    found = [spread for spread in spreads if spread]
    if not found:
        return None
    points = sum(spread.points for spread in found)
    return Spread(
        points=points,
        median=round(sum(spread.points * spread.median for spread in found) / points, 5),
        p95=max(spread.p95 for spread in found),
        worst=max(spread.worst for spread in found),
    )
