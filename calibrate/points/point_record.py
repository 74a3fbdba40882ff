"""What a measurement leaves behind: raw samples, one record a point, and the table points derived from them. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from statistics import median
from typing import Literal

import msgspec

from fp8gate.calibrate.timing.statistics import Interval, paired_speedup
from fp8gate.filter.contract.plain_yaml import round_to_measured
from fp8gate.filter.contract.recipes import RECIPES, Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Point, Status, SweepProtocol

ArmName = Literal["bf16", "bf16_again", "tensorwise", "rowwise", "rowwise_with_gw_hp"]
"""bf16_again is the control: the same linear captured a second time, whose ratio to bf16 should be 1."""

CONTROL: ArmName = "bf16_again"
CONTROL_US = 0.5
"""What a control may differ by besides: of two captures of one linear of 20 us, whose results lie at other addresses,
one took up to 0.45 us longer (NVIDIA H200)."""


class ArmRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One arm of one point. Samples in microseconds, each the mean of a part of a run; none unless status is measured.

    errors: relative errors against float32 (None if not finite). detail: the error message of a failure.
    """

    status: Literal["measured", "out_of_memory", "unstable", "failed"] = "measured"
    fwd_us: tuple[float, ...] = ()
    bwd_us: tuple[float, ...] = ()
    errors: dict[str, float | None] = {}
    detail: str = ""

    @property
    def total_us(self) -> tuple[float, ...]:
        """Forward plus backward of each sample."""
        return tuple(f + b for f, b in zip(self.fwd_us, self.bwd_us, strict=True))


class Stages(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds a point took: compiling (on the CPU), then on the GPU loading and tuning kernels, settling, timing."""

    compiling_s: float = 0.0
    loading_s: float = 0.0
    settling_s: float = 0.0
    timing_s: float = 0.0

    @property
    def on_device_s(self) -> float:
        return self.loading_s + self.settling_s + self.timing_s


class PointRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All arms of one shape, measured together.

    process: the process that measured it. measured_on: the device (device.device_identity). host: the machine. repeat:
    it was measured before, and this is only to see the spread. sm_clock_mhz: after each batch of rounds, if the device
    tells.
    """

    m: int
    k: int
    n: int
    measured_at: datetime
    stages: Stages
    process: int
    measured_on: str = ""
    host: str = ""
    repeat: bool = False
    sm_clock_mhz: tuple[int, ...] = ()
    arms: dict[ArmName, ArmRecord]

    @property
    def shape(self) -> LinearShape:
        return LinearShape(self.m, self.k, self.n)

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        return tuple(recipe for recipe in RECIPES if recipe in self.arms)

    def status(self, recipe: Recipe) -> Status:
        """The recipe's status, or bf16's if that is what is missing; `measured` may still prove ambiguous."""
        bf16, fp8 = self.arms["bf16"], self.arms[recipe]
        return fp8.status if bf16.status == "measured" else bf16.status

    def speedup(self, arm: ArmName, protocol: SweepProtocol) -> Interval:
        """bf16 / this arm's time of forward plus backward; only for a measured arm."""
        return speedup_of(self.arms["bf16"], self.arms[arm], protocol)

    def control_error(self, protocol: SweepProtocol) -> float | None:
        """How far bf16 against itself was from 1, if that is more than chance, the protocol's tolerance, CONTROL_US."""
        if CONTROL not in self.arms or any(self.arms[a].status != "measured" for a in ("bf16", CONTROL)):
            return None
        ratio = self.speedup(CONTROL, protocol)
        error = abs(ratio.estimate - 1)
        tolerated = max(protocol.control, CONTROL_US / median(self.arms["bf16"].total_us))
        return error if ratio.excludes(1.0) and error > tolerated else None

    def point(self, recipe: Recipe, protocol: SweepProtocol) -> Point:
        """The row of the recipe's table."""
        status = self.status(recipe)
        if status != "measured":
            return Point(self.m, self.k, self.n, None, None, None, None, None, None, None, status)
        bf16, fp8 = last_run(self.arms["bf16"], self.arms[recipe], protocol)
        times_us = (median(samples) for samples in (bf16.fwd_us, bf16.bwd_us, fp8.fwd_us, fp8.bwd_us))
        return make_point(self.shape, times_us, self.speedup(recipe, protocol), protocol)


def make_point(shape: LinearShape, times_us: Iterable[float], speedup: Interval, protocol: SweepProtocol) -> Point:
    """A row with numbers. times_us: bf16 forward and backward, float8 forward and backward."""
    bf16_fwd, bf16_bwd, fp8_fwd, fp8_bwd = map(round_to_measured, times_us)
    estimate, low, high = map(round_to_measured, (speedup.estimate, speedup.low, speedup.high))
    status: Status = "measured" if decided(speedup, protocol) else "ambiguous"
    return Point(shape.m, shape.k, shape.n, bf16_fwd, bf16_bwd, fp8_fwd, fp8_bwd, estimate, low, high, status)


def speedup_of(bf16: ArmRecord, fp8: ArmRecord, protocol: SweepProtocol) -> Interval:
    """bf16 / float8 time over the last run that both have, with bounds for what varies within it."""
    bf16, fp8 = last_run(bf16, fp8, protocol)
    return paired_speedup(bf16.total_us, fp8.total_us, confidence=protocol.confidence)


def last_run(bf16: ArmRecord, fp8: ArmRecord, protocol: SweepProtocol) -> tuple[ArmRecord, ArmRecord]:
    """The samples that count: of an arm that ran twice those of the second, longer run, and bf16's from then."""
    end = len(fp8.fwd_us)
    begin = protocol.rounds[0] if end > protocol.rounds[0] else 0
    one, other = (
        msgspec.structs.replace(arm, fwd_us=arm.fwd_us[begin:end], bwd_us=arm.bwd_us[begin:end]) for arm in (bf16, fp8)
    )
    return one, other


def decided(speedup: Interval, protocol: SweepProtocol) -> bool:
    """The bounds exclude the threshold, or are as narrow as the tolerance asks."""
    return speedup.excludes(protocol.threshold) or speedup.within(protocol.tolerance)


def is_near(speedup: Interval, protocol: SweepProtocol) -> bool:
    """The decision hangs on it: within `near` of the threshold, or the bounds straddle that."""
    return abs(speedup.estimate / protocol.threshold - 1) <= protocol.near or not speedup.excludes(protocol.threshold)
