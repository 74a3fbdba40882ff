"""What a sweep did with its time, and how far its numbers can be trusted. Pure.

In: the records of a call, and the seconds that only the sweep knows. Out: a `Report`, also as text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from fp8gate.calibrate.points.point_record import CONTROL, PointRecord
from fp8gate.calibrate.sweep.session import SessionResult
from fp8gate.calibrate.sweep.spread import OddDevice, between_devices, devices_of, odd_devices, spread_of
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Spread, SweepProtocol


class SweepReport(msgspec.Struct, frozen=True, kw_only=True):
    """Points and seconds of one call. ambiguous and without_numbers count speedups: one a point and recipe.

    compiling_s is summed over all processes, the others are of the device. starting_s: until the first point was ready.
    idle_s: from then on, with nobody's turn on the device; both of rank 0, if there are several. worst_control: the
    largest |bf16 / bf16 - 1| of the control points. spread: of the points that were measured again. between: of those
    that several devices measured. lost: ranks that did not stay to the end, and why.
    """

    measured: int
    resumed: int
    retried: int
    ambiguous: int
    without_numbers: int
    capped: int
    total_s: float
    starting_s: float
    compiling_s: float
    loading_s: float
    settling_s: float
    timing_s: float
    idle_s: float
    controls: int
    worst_control: float | None
    spread: dict[Recipe, Spread]
    devices: int = 1
    between: dict[Recipe, Spread] = {}
    odd: tuple[OddDevice, ...] = ()
    lost: dict[int, str] = {}

    def text(self) -> str:
        lines = [
            f"{self.measured} points measured, {self.resumed} taken from the journal, {self.retried} retried, "
            f"{self.capped} left out; {self.ambiguous} speedups ambiguous, "
            f"{self.without_numbers} without numbers",
            f"{self.total_s:.0f} s: starting {self.starting_s:.0f}, then on the device loading and tuning "
            f"{self.loading_s:.0f}, settling {self.settling_s:.0f}, timing {self.timing_s:.0f}, idle "
            f"{self.idle_s:.0f}; compiling {self.compiling_s:.0f} s over all processes",
        ]
        if self.worst_control is not None:
            lines.append(f"bf16 against itself at {self.controls} points: at most {self.worst_control:.2%} apart")
        for recipe, spread in self.spread.items():
            lines.append(
                f"{recipe} again at {spread.points} points: {spread.median:.2%} apart (median), {spread.p95:.2%} "
                f"(95th percentile), {spread.worst:.2%} (worst)"
            )
        for recipe, spread in self.between.items():
            lines.append(
                f"{recipe} on {self.devices} devices at {spread.points} points: {spread.median:.2%} from their median "
                f"(median), {spread.p95:.2%} (95th percentile), {spread.worst:.2%} (worst)"
            )
        lines += [f"odd: {device}" for device in self.odd]
        lines += [f"rank {rank} {why}" for rank, why in sorted(self.lost.items())]
        return "\n".join(lines)


def make_sweep_report(
    records: Sequence[PointRecord],
    protocols: Mapping[Recipe, SweepProtocol],
    part: SessionResult,
    *,
    history: Sequence[PointRecord],
    resumed: int,
    capped: int,
    total_s: float,
) -> SweepReport:
    """Count and sum over the records of one call; what was measured again took its time too.

    history: all records of the journal, as a repeat's first measurement may be of an earlier call.
    """
    stages = [*(r.stages for r in records), *part.discarded]
    statuses = [r.point(recipe, protocols[recipe]).status for r in records if not r.repeat for recipe in r.recipes]
    protocol = next(iter(protocols.values()))
    controls = [control for r in records if (control := _control(r, protocol)) is not None]
    spreads = {recipe: spread(recipe, protocol, history) for recipe, protocol in protocols.items()}
    between = {recipe: between_devices(recipe, protocol, history) for recipe, protocol in protocols.items()}
    return SweepReport(
        measured=len(records),
        resumed=resumed,
        retried=part.retried,
        ambiguous=statuses.count("ambiguous"),
        without_numbers=sum(status not in ("measured", "ambiguous") for status in statuses),
        capped=capped,
        total_s=total_s,
        starting_s=part.starting_s,
        compiling_s=sum(s.compiling_s for s in stages),
        loading_s=sum(s.loading_s for s in stages),
        settling_s=sum(s.settling_s for s in stages),
        timing_s=sum(s.timing_s for s in stages),
        idle_s=part.idle_s,
        controls=len(controls),
        worst_control=max(controls, default=None),
        spread={recipe: found for recipe, found in spreads.items() if found},
        devices=len(devices_of(history)),
        between={recipe: found for recipe, found in between.items() if found},
        odd=tuple(odd_devices(history, part.troubles)),
        lost=part.lost,
    )


def spread(recipe: Recipe, protocol: SweepProtocol, records: Sequence[PointRecord]) -> Spread | None:
    """How far repeats were from the first measurement of the same shape, by another process on the same device.

    None without any.
    """
    first = {r.shape: r for r in records if not r.repeat and recipe in r.arms and r.status(recipe) == "measured"}
    again = [r for r in records if r.repeat and recipe in r.arms and r.status(recipe) == "measured"]
    apart = [_apart(first[r.shape], r, recipe, protocol) for r in again if _is_other(first, r)]
    return spread_of(apart, len(apart))


def control_spread(protocol: SweepProtocol, records: Iterable[PointRecord]) -> Spread | None:
    """How far bf16 was from itself at the control points; None without any."""
    apart = [control for record in records if (control := _control(record, protocol)) is not None]
    return spread_of(apart, len(apart))


def _is_other(first: Mapping[LinearShape, PointRecord], again: PointRecord) -> bool:
    if again.shape not in first or first[again.shape].measured_on != again.measured_on:
        return False
    return first[again.shape].process != again.process


def _apart(one: PointRecord, other: PointRecord, recipe: Recipe, protocol: SweepProtocol) -> float:
    speedups = (r.speedup(recipe, protocol).estimate for r in (one, other))
    first, second = speedups
    return abs(second / first - 1)


def _control(record: PointRecord, protocol: SweepProtocol) -> float | None:
    if CONTROL not in record.arms or not record.arms[CONTROL].fwd_us:
        return None
    return abs(record.speedup(CONTROL, protocol).estimate - 1)
