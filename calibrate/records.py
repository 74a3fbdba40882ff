"""What a measurement leaves behind: raw samples, one record a point, and the table points derived from them. Pure."""

from __future__ import annotations

from datetime import datetime
from statistics import median
from typing import Literal

import msgspec

from fp8gate.calibrate.statistics import Interval, paired_speedup
from fp8gate.filter.shapes import LinearShape
from fp8gate.filter.table import Point, Protocol, Recipe, Status, round_to_measured

ArmName = Literal["bf16", "tensorwise", "rowwise", "rowwise_with_gw_hp"]


class ArmRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One arm of one point. Samples in microseconds, one a round, none averaged; none unless status is measured.

    errors: relative errors against float32 (None if not finite). detail: the error message of a failure.
    """

    status: Literal["measured", "out_of_memory", "unstable", "failed"] = "measured"
    fwd_us: tuple[float, ...] = ()
    bwd_us: tuple[float, ...] = ()
    errors: dict[str, float | None] = {}
    detail: str = ""

    @property
    def total_us(self) -> tuple[float, ...]:
        """Forward plus backward of each round."""
        return tuple(f + b for f, b in zip(self.fwd_us, self.bwd_us, strict=True))


class PointRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All arms of one shape, measured together. seconds: what the point cost, compiling and loading included."""

    m: int
    k: int
    n: int
    measured_at: datetime
    seconds: float
    arms: dict[ArmName, ArmRecord]

    @property
    def shape(self) -> LinearShape:
        return LinearShape(self.m, self.k, self.n)

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        return tuple(name for name in self.arms if name != "bf16")

    def status(self, recipe: Recipe) -> Status:
        """The recipe's status, or bf16's if that is what is missing; `measured` may still prove ambiguous."""
        bf16, fp8 = self.arms["bf16"], self.arms[recipe]
        return fp8.status if bf16.status == "measured" else bf16.status

    def speedup(self, recipe: Recipe, confidence: float) -> Interval:
        """bf16 / float8 time of forward plus backward; only for a measured recipe."""
        bf16, fp8 = self.arms["bf16"], self.arms[recipe]
        return paired_speedup(bf16.total_us, fp8.total_us, confidence=confidence)

    def point(self, recipe: Recipe, protocol: Protocol) -> Point:
        """The row of the recipe's table."""
        status = self.status(recipe)
        if status != "measured":
            return Point(self.m, self.k, self.n, None, None, None, None, None, None, None, status)
        bf16, fp8 = self.arms["bf16"], self.arms[recipe]
        speedup = self.speedup(recipe, protocol.confidence)
        times_us = (median(samples) for samples in (bf16.fwd_us, bf16.bwd_us, fp8.fwd_us, fp8.bwd_us))
        bf16_fwd, bf16_bwd, fp8_fwd, fp8_bwd = map(round_to_measured, times_us)
        estimate, low, high = map(round_to_measured, (speedup.estimate, speedup.low, speedup.high))
        if not decided(speedup, protocol):
            status = "ambiguous"
        return Point(self.m, self.k, self.n, bf16_fwd, bf16_bwd, fp8_fwd, fp8_bwd, estimate, low, high, status)


def decided(speedup: Interval, protocol: Protocol) -> bool:
    """No further round is needed: the bounds exclude the threshold, or are as narrow as the tolerance asks."""
    return speedup.excludes(protocol.threshold) or speedup.within(protocol.tolerance)
