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

from fp8gate.calibrate.records import PointRecord
from fp8gate.filter.shapes import LinearShape
from fp8gate.filter.table import Protocol, Recipe, Spread

ODD_BY = 0.03  # two H200 of one machine differ by 1 to 2 % under their power limit (LOG.md, 2026-11-24)
ODD_SHARE = 0.75  # of the points, all in the same direction


class OddDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device whose times differ from the median of all devices by `slower` (0.07: 7 % slower), at so many points."""

    measured_on: str
    slower: float
    points: int
    of: int
    trouble: str = ""

    def __str__(self) -> str:
        direction = "slower" if self.slower > 0 else "faster"
        where = f"{self.points} of {self.of} points"
        text = f"{self.measured_on}: {abs(self.slower):.1%} {direction} than the median in {where}"
        return f"{text}; {self.trouble}" if self.trouble else text


def devices_of(records: Sequence[PointRecord]) -> set[str]:
    return {record.measured_on for record in records}


def between_devices(recipe: Recipe, protocol: Protocol, records: Sequence[PointRecord]) -> Spread | None:
    """Of each speedup that several devices measured, how far each is from their median; None if none was."""
    speedups: dict[LinearShape, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if recipe in record.arms and record.status(recipe) == "measured":
            estimate = record.speedup(recipe, protocol).estimate
            speedups[record.shape][record.measured_on].append(estimate)
    shared = {shape: [median(own) for own in by.values()] for shape, by in speedups.items() if len(by) > 1}
    apart = [abs(speedup / median(all_) - 1) for all_ in shared.values() for speedup in all_]
    if not apart:
        return None
    middle, p95, worst = (round(float(value), 5) for value in np.quantile(apart, (0.5, 0.95, 1.0)))
    return Spread(points=len(shared), median=middle, p95=p95, worst=worst)


def odd_devices(records: Sequence[PointRecord], troubles: Mapping[str, str]) -> list[OddDevice]:
    """The devices that are slower or faster than the others, the oddest first. troubles: what each has reported."""
    slower: dict[str, list[float]] = defaultdict(list)
    for times_us in _times_us(records):
        if len(times_us) > 2:  # of two, nobody can say which one is odd
            middle = median(times_us.values())
            for device, time_us in times_us.items():
                slower[device].append(time_us / middle - 1)
    odd = []
    for device, apart in slower.items():
        by = median(apart)
        points = len([value for value in apart if value * by > 0])
        if abs(by) > ODD_BY and points >= ODD_SHARE * len(apart):
            trouble = troubles.get(device, "")
            odd.append(OddDevice(measured_on=device, slower=by, points=points, of=len(apart), trouble=trouble))
    return sorted(odd, key=lambda device: -abs(device.slower))


def _times_us(records: Sequence[PointRecord]) -> list[dict[str, float]]:
    """For each shape, what all arms together took on each device."""
    by_shape: dict[LinearShape, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if all(arm.status == "measured" for arm in record.arms.values()):
            arms = [record.arms["bf16"], *(record.arms[recipe] for recipe in record.recipes)]
            total_us = sum(median(arm.total_us) for arm in arms)
            by_shape[record.shape][record.measured_on].append(total_us)
    return [{device: median(own) for device, own in by.items()} for by in by_shape.values()]
