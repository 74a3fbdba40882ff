"""How far measurements of the same points are apart, and which device of a sweep is odd. Pure.

In: records. Out: the spread between measurements of one device, between devices, and of bf16 against itself; and the
devices that are slower or faster than the others throughout.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

import msgspec
import numpy as np

from fp8gate.calibrate.points.point_record import CONTROL, ArmName, PointRecord
from fp8gate.filter.contract.bounds import Spread
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import SweepProtocol

ODD_BY = 0.03  # two H200 of one machine differ by 1 to 2 % under their power limit (LOG.md, 2026-11-24)
ODD_SHARE = 0.75  # of the points, all in the same direction


class OddDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device whose times differ from those of the median device.

    slower: by how much, as a share (0.07: 7 % slower, -0.05: 5 % faster). points, of: at how many of its points it
    differs in this direction, and how many there are. trouble: what the device itself has reported.
    """

    measured_on: str
    host: str
    slower: float
    points: int
    of: int
    trouble: str = ""

    def __str__(self) -> str:
        direction = "slower" if self.slower > 0 else "faster"
        where = f"{self.points} of {self.of} points"
        text = f"{self.host} {self.measured_on}: {abs(self.slower):.1%} {direction} than the median in {where}"
        return f"{text}; {self.trouble}" if self.trouble else text


def devices_of(records: Sequence[PointRecord]) -> set[str]:
    return {record.measured_on for record in records}


def repeat_spread(recipe: Recipe, protocol: SweepProtocol, records: Sequence[PointRecord]) -> Spread | None:
    """How far repeats were from the first measurement of the same shape, by another process on the same device.

    None if there is no such repeat.
    """
    measured = [r for r in records if recipe in r.arms and r.status(recipe) == "measured"]
    first = {r.shape: r for r in measured if not r.repeat}
    pairs = [(first[r.shape], r) for r in measured if r.repeat and r.shape in first]
    apart = [
        abs(again.speedup(recipe, protocol).estimate / one.speedup(recipe, protocol).estimate - 1)
        for one, again in pairs
        if one.measured_on == again.measured_on and one.process != again.process
    ]
    return spread_of(apart, len(apart))


def repeated_speedups(
    recipe: Recipe, protocol: SweepProtocol, records: Sequence[PointRecord]
) -> dict[LinearShape, float]:
    """The newest speedup of each repeat that has one."""
    return {
        record.shape: record.speedup(recipe, protocol).estimate
        for record in records
        if record.repeat and recipe in record.arms and record.status(recipe) == "measured"
    }


def control_spread(protocol: SweepProtocol, records: Iterable[PointRecord]) -> Spread | None:
    """How far bf16 was from itself at the control points; None if there are none."""
    differences = control_differences(protocol, records)
    return spread_of(differences, len(differences))


def control_differences(protocol: SweepProtocol, records: Iterable[PointRecord]) -> list[float]:
    """|bf16 / bf16 - 1| of every record that has a control with numbers."""
    ratios = (record.control_ratio(protocol) for record in records)
    return [abs(ratio.estimate - 1) for ratio in ratios if ratio is not None]


def between_devices(recipe: Recipe, protocol: SweepProtocol, records: Sequence[PointRecord]) -> Spread | None:
    """How far each device's speedup is from the median of all devices, at the points that several of them measured.

    None if no point was measured on several devices.
    """
    speedups: dict[LinearShape, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if recipe in record.arms and record.status(recipe) == "measured":
            estimate = record.speedup(recipe, protocol).estimate
            speedups[record.shape][record.measured_on].append(estimate)
    shared = {shape: [median(own) for own in by.values()] for shape, by in speedups.items() if len(by) > 1}
    apart = [abs(speedup / median(all_) - 1) for all_ in shared.values() for speedup in all_]
    return spread_of(apart, len(shared))


def spread_of(apart: Sequence[float], points: int) -> Spread | None:
    """Quantiles of relative differences, which so many points have shown; None if there are no differences."""
    if not apart:
        return None
    middle, p95, worst = (round(float(value), 5) for value in np.quantile(apart, (0.5, 0.95, 1.0)))
    return Spread(points=points, median=middle, p95=p95, worst=worst)


def odd_devices(records: Sequence[PointRecord], troubles: Mapping[str, str]) -> list[OddDevice]:
    """The devices that are slower or faster than the others, the oddest first. troubles: what each has reported."""
    slower: dict[str, list[float]] = defaultdict(list)
    for by_device in _slower_than_median(records).values():
        for device, of_arms in by_device.items():
            slower[device].append(median(of_arms))
    hosts = {record.measured_on: record.host for record in records}
    odd = []
    for device, of_points in slower.items():
        by = median(of_points)
        points = len([value for value in of_points if value * by > 0])
        if abs(by) > ODD_BY and points >= ODD_SHARE * len(of_points):
            odd.append(
                OddDevice(
                    measured_on=device,
                    host=hosts[device],
                    slower=by,
                    points=points,
                    of=len(of_points),
                    trouble=troubles.get(device, ""),
                )
            )
    return sorted(odd, key=lambda device: -abs(device.slower))


def _slower_than_median(records: Sequence[PointRecord]) -> dict[LinearShape, dict[str, list[float]]]:
    """Of each shape and device, how much slower each arm was than on the median device of three or more."""
    times_us: dict[tuple[LinearShape, ArmName], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for name, arm in record.arms.items():
            if arm.fwd_us and name != CONTROL:
                times_us[record.shape, name][record.measured_on].append(median(arm.total_us))
    found: dict[LinearShape, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (shape, _), by_device in times_us.items():
        own = {device: median(times) for device, times in by_device.items()}
        if len(own) > 2:  # of two devices, neither is odd more than the other
            for device, time_us in own.items():
                found[shape][device].append(time_us / median(own.values()) - 1)
    return found
