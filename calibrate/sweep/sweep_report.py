"""What a sweep did with its time, and how far its numbers can be trusted. Pure.

In: the records of a call, and the seconds that only the sweep knows. Out: a `SweepReport`, also as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from fp8gate.calibrate.points.noise import TOO_MANY, Row
from fp8gate.calibrate.points.point_record import PointRecord
from fp8gate.calibrate.sweep.session import SessionResult
from fp8gate.calibrate.sweep.spread import (
    OddDevice,
    between_devices,
    control_differences,
    devices_of,
    odd_devices,
    repeat_spread,
)
from fp8gate.filter.contract.bounds import Spread
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import SweepProtocol

MOST_NAMED = 5  # of the speedups that are noise; the JSON names all


class SweepReport(msgspec.Struct, frozen=True, kw_only=True):
    """Points and seconds of one call of `sweep`.

    measured, resumed: measurements that this call took, and those of the sweep that it found in the journal; repeats
    and second looks count. retried, capped: points measured again after a failure, and left out as too large.
    ambiguous, without_numbers: speedups, of which a point has one for each recipe. speedups, noise: how many speedups
    were timed, in this call or before, and why some of them are noise, by their shape and recipe. load: the highest
    load of this machine, in words. is_busy: whether that is more than the sweep's own work.
    compiling_s is the sum over all processes; the other seconds are those of the device. starting_s: until the first
    point was ready. idle_s: after that, while no process had its turn on the device. With several ranks, both are those
    of rank 0.
    controls, worst_control: how many control points there were, and the largest |bf16 / bf16 - 1| of them. spread: how
    far measurements of the same point by two processes were apart. devices: how many took part. between: how far they
    were apart at the points that several of them measured. odd: those that differ from the others throughout. lost:
    the ranks that did not stay to the end, and why.
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
    speedups: int = 0
    noise: dict[str, str] = {}
    load: str = ""
    is_busy: bool = False

    @property
    def too_noisy(self) -> str | None:
        """What to say and to do about a sweep that is noise in too many points; None if it is not."""
        if len(self.noise) <= TOO_MANY * self.speedups:
            return None
        return (
            f"{self._noise_sentence()}: more than {TOO_MANY:.0%}; run the same command when nothing else runs here: it "
            "measures only these again"
        )

    def _noise_sentence(self) -> str:
        where = "on a busy host, " if self.is_busy else ""
        return f"{len(self.noise)} of {self.speedups} speedups are noise and decide nothing ({where}{self.load})"

    def _noise_lines(self) -> list[str]:
        if not self.noise:
            return [f"the host was busy: {self.load}"] if self.is_busy else []
        named = [f"  {where}: {why}" for where, why in list(self.noise.items())[:MOST_NAMED]]
        more = len(self.noise) - MOST_NAMED
        return [self._noise_sentence(), *named, *([f"  and {more} more"] if more > 0 else [])]

    def text(self) -> str:
        lines = [
            f"{self.measured} points measured, {self.resumed} taken from the journal, {self.retried} retried, "
            f"{self.capped} left out; {self.ambiguous} speedups ambiguous, "
            f"{self.without_numbers} without numbers",
            *self._noise_lines(),
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
    session: SessionResult,
    *,
    rows: Mapping[Recipe, Mapping[LinearShape, Row]],
    history: Sequence[PointRecord],
    resumed: int,
    capped: int,
    total_s: float,
) -> SweepReport:
    """Count and sum over the records of one call, and over the stages that were thrown away, as they took time too.

    rows: those of each recipe's table. history: all records of the journal that nothing disturbed, as the first
    measurement of a repeated point may be of an earlier call.
    """
    stages = [*(r.stages for r in records), *session.discarded]
    now = {(record.shape, recipe) for record in records if not record.repeat for recipe in record.recipes}
    statuses = [rows[recipe][shape].point.status for shape, recipe in now]
    controls = control_differences(next(iter(protocols.values())), records)
    spreads = {recipe: repeat_spread(recipe, protocol, history) for recipe, protocol in protocols.items()}
    between = {recipe: between_devices(recipe, protocol, history) for recipe, protocol in protocols.items()}
    return SweepReport(
        measured=len(records),
        resumed=resumed,
        retried=session.retried,
        ambiguous=statuses.count("ambiguous"),
        without_numbers=sum(status not in ("measured", "ambiguous", "noisy") for status in statuses),
        capped=capped,
        total_s=total_s,
        starting_s=session.starting_s,
        compiling_s=sum(s.compiling_s for s in stages),
        loading_s=sum(s.loading_s for s in stages),
        settling_s=sum(s.settling_s for s in stages),
        timing_s=sum(s.timing_s for s in stages),
        idle_s=session.idle_s,
        controls=len(controls),
        worst_control=max(controls, default=None),
        spread={recipe: found for recipe, found in spreads.items() if found},
        devices=len(devices_of(history)),
        between={recipe: found for recipe, found in between.items() if found},
        odd=tuple(odd_devices(history, session.troubles)),
        lost=session.lost,
        speedups=sum(row.measurements > 0 for by_shape in rows.values() for row in by_shape.values()),
        noise={f"{s} {recipe}": row.noise for recipe in rows for s, row in rows[recipe].items() if row.noise},
        load=str(session.host),
        is_busy=session.host.is_busy,
    )
