"""How far the devices of one sweep are apart, and which of them is odd. Pure.

In: records, of which some shapes were measured on several devices. Out: the spread of the speedups, and the devices
that are slower or faster than the others throughout.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median

import msgspec
import numpy as np

from fp8gate.calibrate.points.point_record import CONTROL, ArmName, PointRecord
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Spread, SweepProtocol

ODD_BY = 0.03  # two H200 of one machine differ by 1 to 2 % under their power limit (LOG.md, 2026-11-24)
ODD_SHARE = 0.75  # of the points, all in the same direction


class OddDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device whose times differ from the median of all devices by `slower` (0.07: 7 % slower), at so many points."""

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


def between_devices(recipe: Recipe, protocol: SweepProtocol, records: Sequence[PointRecord]) -> Spread | None:
    """Of each speedup that several devices measured, how far each is from their median; None if none was."""
    speedups: dict[LinearShape, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if recipe in record.arms and record.status(recipe) == "measured":
            estimate = record.speedup(recipe, protocol).estimate
            speedups[record.shape][record.measured_on].append(estimate)
    shared = {shape: [median(own) for own in by.values()] for shape, by in speedups.items() if len(by) > 1}
    apart = [abs(speedup / median(all_) - 1) for all_ in shared.values() for speedup in all_]
    return spread_of(apart, len(shared))


def spread_of(apart: Sequence[float], points: int) -> Spread | None:
    """Quantiles of relative differences that so many points have shown; None without any."""
    if not apart:
        return None
    middle, p95, worst = (round(float(value), 5) for value in np.quantile(apart, (0.5, 0.95, 1.0)))
    return Spread(points=points, median=middle, p95=p95, worst=worst)


def odd_devices(records: Sequence[PointRecord], troubles: Mapping[str, str]) -> list[OddDevice]:
    """The devices that are slower or faster than the others, the oddest first. troubles: what each has reported."""
    slower: dict[str, list[float]] = defaultdict(list)
    for by_device in _slower(records).values():
        for device, of_arms in by_device.items():
            slower[device].append(median(of_arms))
    hosts = {record.measured_on: record.host for record in records}
    odd = []
    for device, apart in slower.items():
        by = median(apart)
        points = len([value for value in apart if value * by > 0])
        if abs(by) > ODD_BY and points >= ODD_SHARE * len(apart):
            trouble = troubles.get(device, "")
            host = hosts[device]
            odd.append(
                OddDevice(measured_on=device, host=host, slower=by, points=points, of=len(apart), trouble=trouble)
            )
    return sorted(odd, key=lambda device: -abs(device.slower))


def _slower(records: Sequence[PointRecord]) -> dict[LinearShape, dict[str, list[float]]]:
    """For each shape and device, how much slower each arm was there than on the median device, of three or more."""
    times_us: dict[tuple[LinearShape, ArmName], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for name, arm in record.arms.items():
            if arm.fwd_us and name != CONTROL:
                times_us[record.shape, name][record.measured_on].append(median(arm.total_us))
    found: dict[LinearShape, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (shape, _), by_device in times_us.items():
        own = {device: median(times) for device, times in by_device.items()}
        if len(own) > 2:  # of two, nobody can say which one is odd
            for device, time_us in own.items():
                found[shape][device].append(time_us / median(own.values()) - 1)
    return found
