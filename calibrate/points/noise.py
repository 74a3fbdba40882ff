"""Which numbers are noise: they are never called measured, and decide nothing. Pure.

In: all records of a recipe, the device's `NoiseLimits`. Out: a `Row` for each shape: its row of the table, and why it
is noise if it is; and what the rows' bounds cover.

A measurement is disturbed if its bounds are too wide or its process had to wait for a processor. A point counts if its
last undisturbed measurement agrees with another one, whichever process took it, or is the only one there is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from fp8gate.calibrate.device.kind import NoiseLimits
from fp8gate.calibrate.points.bounds import RepeatedPoint, run_bounds, widened
from fp8gate.calibrate.points.point_record import PointRecord, make_point
from fp8gate.calibrate.timing.statistics import Interval
from fp8gate.filter.contract.bounds import Bounds, RunBounds, is_small
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Point, SweepProtocol

TOO_MANY = 0.1
"""The share of noise from which on a sweep has not done its work. An interpolation takes 8 points around a shape: at a
tenth, more than half of them lack one."""
MIN_DISAGREEING = 2  # points whose repeats disagree; a single one may be bad luck


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
    """One record of a shape with numbers. bf16_us: as a row states it. disturbed: why it cannot be trusted, or ""."""

    record: PointRecord
    speedup: Interval
    bf16_us: float
    disturbed: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Verdict:
    """What counts of a shape's measurements: the chosen one and those that confirm it; or why they are noise.

    repeat: the one that shows how far another sweep is from the chosen one. Where all points are measured twice, it is
    one that confirms, as it would be in another sweep.
    """

    chosen: _Measurement
    witnesses: tuple[_Measurement, ...] = ()
    repeat: _Measurement | None = None
    noise: str = ""


def judge(
    records: Iterable[PointRecord], recipe: Recipe, protocol: SweepProtocol, limits: NoiseLimits
) -> dict[LinearShape, Row]:
    """The row of every shape that was measured for the recipe, sorted by shape: `judge_with_bounds` without bounds."""
    return judge_with_bounds(records, recipe, protocol, limits)[0]


def judge_with_bounds(
    records: Iterable[PointRecord], recipe: Recipe, protocol: SweepProtocol, limits: NoiseLimits
) -> tuple[dict[LinearShape, Row], Bounds | None]:
    """The row of every shape that was measured for the recipe, sorted by shape, and what the rows' bounds cover.

    A shape's last measurement that is no repeat and not disturbed gives the numbers. The bounds cover what varies
    within its run, what repeats say of the difference between runs, what boards differ by, and each measurement that
    confirms it. There are no bounds without numbers.
    """
    by_shape: dict[LinearShape, list[PointRecord]] = defaultdict(list)
    for record in records:
        if recipe in record.arms:
            by_shape[record.shape].append(record)
    measured = {shape: _measurements(found, recipe, protocol, limits) for shape, found in by_shape.items()}
    verdicts = {shape: _verdict(found, limits) for shape, found in measured.items()}
    bounds = _bounds([verdict for verdict in verdicts.values() if verdict and not verdict.noise], limits)
    rows = {}
    for shape in sorted(by_shape):
        firsts = [record for record in by_shape[shape] if not record.repeat]
        if verdict := verdicts[shape]:
            point = _point(verdict, recipe, protocol, bounds)
            is_disturbed = bool(verdict.chosen.disturbed)
            times = len(measured[shape])
            rows[shape] = Row(point=point, noise=verdict.noise, is_disturbed=is_disturbed, measurements=times)
        elif firsts:
            rows[shape] = Row(point=firsts[-1].point(recipe, protocol))
    return rows, bounds


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
            bf16_us, disturbed = sum(record.times_us(recipe, protocol)[:2]), _disturbed(record, speedup, limits)
            found.append(_Measurement(record=record, speedup=speedup, bf16_us=bf16_us, disturbed=disturbed))
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
    witnesses = tuple(one for one in agreeing if not one.disturbed)
    repeats = witnesses if limits.measures_twice else _repeats(chosen, others)
    return _Verdict(chosen=chosen, witnesses=witnesses, repeat=repeats[0] if repeats else None)


def _repeats(chosen: _Measurement, others: Sequence[_Measurement]) -> Sequence[_Measurement]:
    """Those that other processes took of a random sample of points, whatever they say, those of other devices first.

    Second looks do not count: they were taken at points that looked like noise.
    """
    process = chosen.record.process
    found = [one for one in others if one.record.repeat and one.record.process != process and not one.disturbed]
    return sorted(found, key=lambda one: one.record.measured_on == chosen.record.measured_on)


def _apart(one: _Measurement, other: _Measurement) -> float:
    """The larger speedup over the smaller."""
    quotient = one.speedup.estimate / other.speedup.estimate
    return max(quotient, 1 / quotient)


def _bounds(verdicts: Sequence[_Verdict], limits: NoiseLimits) -> Bounds | None:
    """By class of bf16 time. Points that are noise do not count: their rows have no bounds."""
    small, large = (
        _class_bounds([verdict for verdict in verdicts if is_small(verdict.chosen.bf16_us) is of_small], known)
        for of_small, known in zip((True, False), limits.between_runs, strict=True)
    )
    if small is None and large is None:
        return None
    return Bounds(below_120_us=small, from_120_us=large, board_us=limits.board_us)


def _class_bounds(verdicts: Sequence[_Verdict], known: float) -> RunBounds | None:
    if not verdicts:
        return None
    repeated = [RepeatedPoint(v.chosen.speedup, v.repeat.speedup.estimate) for v in verdicts if v.repeat]
    return run_bounds(repeated, [verdict.chosen.speedup for verdict in verdicts], known=known)


def _point(verdict: _Verdict, recipe: Recipe, protocol: SweepProtocol, bounds: Bounds | None) -> Point:
    """The row. bounds: what those of all rows cover."""
    record = verdict.chosen.record
    if verdict.noise or bounds is None:
        return Point(record.m, record.k, record.n, None, None, None, None, None, None, None, "noisy")
    times_us = record.times_us(recipe, protocol)
    speedup = widened(verdict.chosen.speedup, bounds.between_runs(sum(times_us[:2]), sum(times_us[2:])))
    low = min(speedup.low, *(one.speedup.low for one in verdict.witnesses), speedup.estimate)
    high = max(speedup.high, *(one.speedup.high for one in verdict.witnesses), speedup.estimate)
    return make_point(record.shape, times_us, Interval(speedup.estimate, low, high), protocol)


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
