"""One table from several of the same device, software and protocol: sweeps of several days, of a job array. Pure.

In: tables. Out: a table with every point of all of them, in any order the same. Points that several have are combined
by the bounds of their speedups: the weighted mean of ln(speedup), weights 1 / variance. Where the tables differ by more
than their bounds say, the bounds cover all of theirs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist

import msgspec

from fp8gate.calibrate.points.point_record import make_point
from fp8gate.calibrate.sweep.grid import union
from fp8gate.calibrate.sweep.journal import differences
from fp8gate.calibrate.timing.statistics import Interval
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import (
    WITH_NUMBERS,
    Point,
    Spread,
    Status,
    SweepProtocol,
    Table,
    TableError,
    format_table,
)

ROUNDING = 1e-4  # of ln(speedup): tables keep 4 digits, and bounds that coincide are not infinitely sure
NO_NUMBERS: tuple[Status, ...] = ("failed", "unstable", "out_of_memory")  # which reason counts, if there are several


def merge_tables(tables: Mapping[str, Table]) -> Table:
    """Combine tables; their names (files) appear in errors.

    Raises TableError if there are fewer than two, or if recipe, device, software or protocol differ.
    """
    if len(tables) < 2:
        raise TableError(f"merge: expected two tables or more, got {len(tables)}")
    first_name, first = next(iter(tables.items()))
    for name, table in tables.items():
        if difference := _difference(first, table):
            raise TableError(f"{name}: {difference} in {first_name}; only tables of one kind can be merged")
    ordered = sorted(tables.values(), key=format_table)  # so that no sum depends on the order given
    by_shape: dict[LinearShape, list[Point]] = defaultdict(list)
    for table in ordered:
        for point in table.points:
            by_shape[point.shape].append(point)
    protocols = [table.protocol for table in ordered]
    return msgspec.structs.replace(
        first,
        protocol=msgspec.structs.replace(
            first.protocol,
            spread=_pooled(protocol.spread for protocol in protocols),
            controls=_pooled(protocol.controls for protocol in protocols),
            devices=max(protocol.devices for protocol in protocols),
            between=_pooled(protocol.between for protocol in protocols),
        ),
        measured_at=max(table.measured_at for table in ordered),
        grid=union(*(table.grid for table in ordered)),
        points=tuple(combine_points(by_shape[shape], first.protocol) for shape in sorted(by_shape)),
    )


def combine_points(points: Sequence[Point], protocol: SweepProtocol) -> Point:
    """One point from several of the same shape; those without numbers count only if none has any."""
    with_numbers = [point for point in points if point.status in WITH_NUMBERS]
    if not with_numbers:
        return min(points, key=lambda point: NO_NUMBERS.index(point.status))
    if len(with_numbers) == 1:
        return with_numbers[0]
    z = NormalDist().inv_cdf((1 + protocol.confidence) / 2)
    logs = [[math.log(number) for number in point.numbers if number] for point in with_numbers]
    sigmas = [max((high - low) / 2 / z, ROUNDING) for *_, low, high in logs]
    weights = [1 / sigma**2 for sigma in sigmas]
    *times, mean = (_weighted_mean(column, weights) for column in list(zip(*logs, strict=True))[:5])
    half = z / math.sqrt(sum(weights))
    low, high = mean - half, mean + half
    chi_squared = sum(w * (log[4] - mean) ** 2 for w, log in zip(weights, logs, strict=True))
    if chi_squared > len(logs) - 1:
        low, high = (bound(log[index] for log in logs) for bound, index in ((min, 5), (max, 6)))
    speedup = Interval(math.exp(mean), math.exp(low), math.exp(high))
    return make_point(with_numbers[0].shape, map(math.exp, times), speedup, protocol)


def _weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)


def _difference(one: Table, other: Table) -> str:
    """The first field that differs: "software.torch is 2.13.0, but 2.11.0"."""
    if one.recipe != other.recipe:
        return f"recipe is {other.recipe}, but {one.recipe}"
    for part in ("device", "software", "protocol"):
        for field, ours, theirs in differences(getattr(one, part), getattr(other, part)):
            if field not in ("spread", "controls", "devices", "between"):
                return f"{part}.{field} is {theirs}, but {ours}"
    return ""


def _pooled(spreads: Iterable[Spread | None]) -> Spread | None:
    """Of all tables' points together, as far as their quantiles tell: the median weighted, the others the largest."""
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
