"""What a measurement leaves behind: raw samples in one record a point, and the rows of tables made from them. Pure.

In: the samples of every arm of a point. Out: a `PointRecord`, and for each recipe a `Point` of its table.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from statistics import median
from typing import Annotated, Literal

import msgspec

from fp8gate.calibrate.timing.statistics import Interval, paired_speedup, unpaired_speedup
from fp8gate.filter.contract.plain_yaml import round_to_measured
from fp8gate.filter.contract.recipes import RECIPES, Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Point, Positive, Size, Status, SweepProtocol

ArmName = Literal["bf16", "bf16_again", Recipe]
"""bf16_again is the control: the same linear, captured a second time. Its ratio to bf16 should be 1."""

CONTROL: ArmName = "bf16_again"
CONTROL_US = 0.5
"""Microseconds by which a control may differ whatever the protocol tolerates. Two captures of one linear write their
results to different addresses: of two that take 20 us, one took up to 0.45 us longer (NVIDIA H200)."""


class ArmRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One arm of one point. Samples are in microseconds, each the mean of a part of a run.

    There are samples only if `status` is measured. errors: relative errors against float32 (None if not finite).
    detail: the error message of a failure.
    """

    status: Literal["measured", "out_of_memory", "unstable", "failed"] = "measured"
    fwd_us: tuple[Positive, ...] = ()
    bwd_us: tuple[Positive, ...] = ()
    errors: dict[str, float | None] = {}
    detail: str = ""

    @property
    def total_us(self) -> tuple[float, ...]:
        """Forward plus backward of each sample."""
        return tuple(f + b for f, b in zip(self.fwd_us, self.bwd_us, strict=True))


class Stages(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The seconds that a point took: compiling on the CPU, then loading and tuning kernels, settling and timing on the
    GPU."""

    compiling_s: float = 0.0
    loading_s: float = 0.0
    settling_s: float = 0.0
    timing_s: float = 0.0

    @property
    def on_device_s(self) -> float:
        return self.loading_s + self.settling_s + self.timing_s


class PointRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All arms of one shape, measured by one process in one go.

    process: the id of that process. measured_on: the device, as `device_identity` names it. host: the machine. repeat:
    the point was measured before, and this record only shows the spread. sm_clock_mhz: the clock after each batch of
    rounds, if the device tells it. waited: seconds that the process's threads waited for a processor, per second of
    measuring; not there where that does not matter, and in records from before it was counted.
    """

    m: Size
    k: Size
    n: Size
    measured_at: Annotated[datetime, msgspec.Meta(tz=True)]
    stages: Stages
    process: int
    measured_on: str = ""
    host: str = ""
    repeat: bool = False
    sm_clock_mhz: tuple[int, ...] = ()
    waited: float | msgspec.UnsetType = msgspec.UNSET
    arms: dict[ArmName, ArmRecord]

    def problem(self) -> str | None:
        """What is inconsistent in the record, or None: types alone do not tell."""
        if "bf16" not in self.arms:
            return "$.arms: expected bf16 among them"
        for name, arm in self.arms.items():
            if len(arm.fwd_us) != len(arm.bwd_us):
                return f"$.arms.{name}: expected as many samples of the forward as of the backward"
            if (arm.status == "measured") != bool(arm.fwd_us):
                return f"$.arms.{name}: expected samples if and only if status is measured; found {arm.status}"
        return None

    @property
    def shape(self) -> LinearShape:
        return LinearShape(self.m, self.k, self.n)

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        return tuple(recipe for recipe in RECIPES if recipe in self.arms)

    def status(self, recipe: Recipe) -> Status:
        """The recipe's status, or that of bf16 if bf16 has no numbers. A measured point may still be ambiguous."""
        bf16, fp8 = self.arms["bf16"], self.arms[recipe]
        return fp8.status if bf16.status == "measured" else bf16.status

    def speedup(self, recipe: Recipe, protocol: SweepProtocol) -> Interval:
        """bf16 / float8 time of forward plus backward; only for a recipe that was measured."""
        return speedup_of(self.arms["bf16"], self.arms[recipe], protocol)

    def control_ratio(self, protocol: SweepProtocol) -> Interval | None:
        """bf16 time / its own time from a second capture; None if this point has no control with numbers.

        Both ran in alternating rounds of one run, so their rounds are paired.
        """
        if CONTROL not in self.arms or not all(self.arms[name].fwd_us for name in ("bf16", CONTROL)):
            return None
        bf16, control = last_run(self.arms["bf16"], self.arms[CONTROL], protocol)
        return paired_speedup(bf16.total_us, control.total_us, confidence=protocol.confidence)

    def control_error(self, protocol: SweepProtocol) -> float | None:
        """How far the control's ratio is from 1, or None if chance, the protocol or CONTROL_US allow that much."""
        ratio = self.control_ratio(protocol)
        if ratio is None:
            return None
        error = abs(ratio.estimate - 1)
        tolerated = max(protocol.control, CONTROL_US / median(self.arms["bf16"].total_us))
        return error if ratio.excludes(1.0) and error > tolerated else None

    def point(self, recipe: Recipe, protocol: SweepProtocol) -> Point:
        """The row of the recipe's table."""
        status = self.status(recipe)
        if status != "measured":
            return Point(self.m, self.k, self.n, None, None, None, None, None, None, None, status)
        return make_point(self.shape, self.times_us(recipe, protocol), self.speedup(recipe, protocol), protocol)

    def times_us(self, recipe: Recipe, protocol: SweepProtocol) -> list[float]:
        """bf16 forward and backward, float8 forward and backward, as the recipe's row states them."""
        bf16, fp8 = last_run(self.arms["bf16"], self.arms[recipe], protocol)
        return [median(samples) for samples in (bf16.fwd_us, bf16.bwd_us, fp8.fwd_us, fp8.bwd_us)]


def make_point(shape: LinearShape, times_us: Iterable[float], speedup: Interval, protocol: SweepProtocol) -> Point:
    """A row with numbers, rounded. times_us: bf16 forward and backward, float8 forward and backward."""
    bf16_fwd, bf16_bwd, fp8_fwd, fp8_bwd = map(round_to_measured, times_us)
    estimate, low, high = map(round_to_measured, (speedup.estimate, speedup.low, speedup.high))
    status: Status = "measured" if decided(speedup, protocol) else "ambiguous"
    return Point(shape.m, shape.k, shape.n, bf16_fwd, bf16_bwd, fp8_fwd, fp8_bwd, estimate, low, high, status)


def speedup_of(bf16: ArmRecord, fp8: ArmRecord, protocol: SweepProtocol) -> Interval:
    """bf16 / float8 time over the last run that both have.

    The estimate is the quotient of the times in the table's row. The bounds cover what varies within that run. The arms
    ran one after the other, so their samples are not paired.
    """
    bf16, fp8 = last_run(bf16, fp8, protocol)
    return unpaired_speedup((bf16.fwd_us, bf16.bwd_us), (fp8.fwd_us, fp8.bwd_us), confidence=protocol.confidence)


def last_run(bf16: ArmRecord, fp8: ArmRecord, protocol: SweepProtocol) -> tuple[ArmRecord, ArmRecord]:
    """The samples that count: the last run of float8, and the run of bf16 that belongs to it.

    If the first run left the decision open, float8 and bf16 ran again for longer, and only that second run counts.
    """
    end = len(fp8.fwd_us)
    begin = protocol.rounds[0] if end > protocol.rounds[0] else 0
    one, other = (
        msgspec.structs.replace(arm, fwd_us=arm.fwd_us[begin:end], bwd_us=arm.bwd_us[begin:end]) for arm in (bf16, fp8)
    )
    return one, other


def decided(speedup: Interval, protocol: SweepProtocol) -> bool:
    """The bounds exclude the threshold, or they are as narrow as the tolerance asks."""
    return speedup.excludes(protocol.threshold) or speedup.within(protocol.tolerance)


def is_near(speedup: Interval, protocol: SweepProtocol) -> bool:
    """Whether a second run may turn the decision: the speedup is within `near` of the threshold, or its bounds
    straddle the threshold."""
    return abs(speedup.estimate / protocol.threshold - 1) <= protocol.near or not speedup.excludes(protocol.threshold)
