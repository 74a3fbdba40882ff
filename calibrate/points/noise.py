"""Which numbers are noise: they are never called measured, and decide nothing. Pure.

In: all records of a recipe, the device's `NoiseLimits`. Out: a `Row` for each shape: its row of the table, and why it
is noise if it is.

A measurement is disturbed if its bounds are too wide or its process had to wait for a processor. A point counts if its
last undisturbed measurement agrees with another one, whichever process took it, or is the only one there is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from fp8gate.calibrate.device.kind import NoiseLimits
from fp8gate.calibrate.points.point_record import PointRecord, make_point
from fp8gate.calibrate.timing.statistics import Interval
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Point, SweepProtocol

TOO_MANY = 0.1
"""The share of noise from which on a sweep has not done its work. An interpolation takes 8 points around a shape: at a
tenth, more than half of them lack one."""
MIN_DISAGREEING = 2  # points whose repeats disagree; a single one may be bad luck
DOUBT_QUANTILE = 0.95  # of how far two measurements of a point are apart: bounds cover at least that much


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row of a table.

    noise: why it has no numbers though it was timed, or "". is_disturbed: it is noise, and no measurement of it was
    undisturbed. measurements: how many have numbers.
    """

    point: Point
    noise: str = ""
    is_disturbed: bool = False
    measurements: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measurement:
    """One record of a shape that has numbers. disturbed: why it cannot be trusted, or ""."""

    record: PointRecord
    speedup: Interval
    disturbed: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Verdict:
    """What counts of a shape's measurements: the chosen one and those that confirm it; or why they are noise."""

    chosen: _Measurement
    witnesses: tuple[_Measurement, ...] = ()
    noise: str = ""


def judge(
    records: Iterable[PointRecord], recipe: Recipe, protocol: SweepProtocol, limits: NoiseLimits
) -> dict[LinearShape, Row]:
    """The row of every shape that was measured for the recipe, sorted by shape.

    A shape's last measurement that is no repeat and not disturbed gives the numbers. Where every point is measured
    twice, the bounds cover both measurements, and are at least as wide as measurements of a point mostly differ.
    """
    by_shape: dict[LinearShape, list[PointRecord]] = defaultdict(list)
    for record in records:
        if recipe in record.arms:
            by_shape[record.shape].append(record)
    measured = {shape: _measurements(found, recipe, protocol, limits) for shape, found in by_shape.items()}
    verdicts = {shape: _verdict(found, limits) for shape, found in measured.items()}
    doubt = _doubt(verdicts.values()) if limits.measures_twice else None
    rows = {}
    for shape in sorted(by_shape):
        firsts = [record for record in by_shape[shape] if not record.repeat]
        if verdict := verdicts[shape]:
            point = _point(verdict, recipe, protocol, doubt)
            is_disturbed = bool(verdict.chosen.disturbed)
            times = len(measured[shape])
            rows[shape] = Row(point=point, noise=verdict.noise, is_disturbed=is_disturbed, measurements=times)
        elif firsts:
            rows[shape] = Row(point=firsts[-1].point(recipe, protocol))
    return rows


def calm(records: Iterable[PointRecord], limits: NoiseLimits) -> list[PointRecord]:
    """The records whose process did not have to wait for a processor: how far they differ says something."""
    return [record for record in records if not _has_waited(record, limits)]


def mostly_disturbed(rows: Iterable[Mapping[LinearShape, Row]]) -> bool:
    """Whether most speedups have only been measured while something disturbed them: it goes on, most likely."""
    timed = [row for by_shape in rows for row in by_shape.values() if row.measurements]
    return sum(row.is_disturbed for row in timed) > len(timed) / 2


def repeats_disagree(rows: Iterable[Mapping[LinearShape, Row]]) -> bool:
    """Whether too many of the points that were measured more than once are noise: then so are others, unseen."""
    repeated = [(shape, row) for by_shape in rows for shape, row in by_shape.items() if row.measurements > 1]
    noise = {shape for shape, row in repeated if row.noise}
    return len(noise) >= MIN_DISAGREEING and len(noise) > TOO_MANY * len({shape for shape, _ in repeated})


def far_from_neighbours(rows: Mapping[LinearShape, Row], limits: NoiseLimits) -> set[LinearShape]:
    """The shapes whose speedup is `limits.far` from what their neighbours on both sides say, the mean over the axes."""
    logs = {shape: math.log(row.point.speedup) for shape, row in rows.items() if row.point.speedup}
    axes = {axis: sorted({getattr(shape, axis) for shape in logs}) for axis in ("m", "k", "n")}
    far = set()
    for shape, log in logs.items():
        between = list(_between_neighbours(shape, logs, axes))
        if between and abs(log - sum(between) / len(between)) > math.log(limits.far):
            far.add(shape)
    return far


def _measurements(
    records: Iterable[PointRecord], recipe: Recipe, protocol: SweepProtocol, limits: NoiseLimits
) -> list[_Measurement]:
    found = []
    for record in records:
        if record.status(recipe) == "measured":
            speedup = record.speedup(recipe, protocol)
            found.append(_Measurement(record=record, speedup=speedup, disturbed=_disturbed(record, speedup, limits)))
    return found


def _disturbed(record: PointRecord, speedup: Interval, limits: NoiseLimits) -> str:
    """Why one measurement by itself cannot be trusted, or ""."""
    if _has_waited(record, limits):
        return f"its threads waited for a processor for {record.waited:.2f} s a second"
    if speedup.high > speedup.low * limits.width:
        return f"its bounds are {speedup.low:.4g} to {speedup.high:.4g}"
    return ""


def _has_waited(record: PointRecord, limits: NoiseLimits) -> bool:
    return record.waited is not msgspec.UNSET and record.waited > limits.waited


def _verdict(found: Sequence[_Measurement], limits: NoiseLimits) -> _Verdict | None:
    """None without any measurement for the table that has numbers."""
    firsts = [one for one in found if not one.record.repeat]
    if not firsts:
        return None
    undisturbed = [one for one in firsts if not one.disturbed]
    if not undisturbed:
        return _Verdict(chosen=firsts[-1], noise=firsts[-1].disturbed)
    chosen = undisturbed[-1]
    others = [one for one in found if one is not chosen]
    others = [one for one in others if not one.disturbed] or others  # a disturbed one says little beside others
    agreeing = tuple(one for one in others if _apart(chosen, one) <= limits.apart)
    if others and not agreeing:
        speedups = ", ".join(f"{one.speedup.estimate:.4g}" for one in found)
        return _Verdict(chosen=chosen, noise=f"its measurements disagree: {speedups}")
    return _Verdict(chosen=chosen, witnesses=tuple(one for one in agreeing if not one.disturbed))


def _apart(one: _Measurement, other: _Measurement) -> float:
    """The larger speedup over the smaller."""
    quotient = one.speedup.estimate / other.speedup.estimate
    return max(quotient, 1 / quotient)


def _doubt(verdicts: Collection[_Verdict | None]) -> float:
    """By what factor two undisturbed measurements of a point differ, at most in DOUBT_QUANTILE of all cases."""
    apart = sorted(_apart(v.chosen, one) for v in verdicts if v and not v.noise for one in v.witnesses)
    return apart[math.ceil(DOUBT_QUANTILE * len(apart)) - 1] if apart else 1.0


def _point(verdict: _Verdict, recipe: Recipe, protocol: SweepProtocol, doubt: float | None) -> Point:
    """The row. doubt: by how much the bounds are to be widened at least; None leaves them as the one run gave them."""
    record, speedup = verdict.chosen.record, verdict.chosen.speedup
    if verdict.noise:
        return Point(record.m, record.k, record.n, None, None, None, None, None, None, None, "noisy")
    if doubt is None:
        return record.point(recipe, protocol)
    low = min(speedup.low, speedup.estimate / doubt, *(one.speedup.low for one in verdict.witnesses))
    high = max(speedup.high, speedup.estimate * doubt, *(one.speedup.high for one in verdict.witnesses))
    return make_point(record.shape, record.times_us(recipe, protocol), Interval(speedup.estimate, low, high), protocol)


def _between_neighbours(
    shape: LinearShape, logs: Mapping[LinearShape, float], axes: Mapping[str, Sequence[int]]
) -> Iterator[float]:
    """For each axis on which the next sizes on both sides were measured: ln of the speedup between these two."""
    for axis, sizes in axes.items():
        size = getattr(shape, axis)
        at = sizes.index(size)
        if 0 < at < len(sizes) - 1:
            below, above = sizes[at - 1], sizes[at + 1]
            low, high = (msgspec.structs.replace(shape, **{axis: other}) for other in (below, above))
            if low in logs and high in logs:
                share = math.log(size / below) / math.log(above / below)
                yield (1 - share) * logs[low] + share * logs[high]
