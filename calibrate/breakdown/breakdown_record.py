"""What a breakdown holds: for each arm its kernels beside its timing, and what the device reaches at best. Pure.

In: numbers from the timer, the profiler and the roofline. Out: their sums, and whether the kernels explain the timing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fp8gate.calibrate.points.point_record import ArmName
from fp8gate.filter.contract.recipes import Variant
from fp8gate.filter.contract.shapes import LinearShape

AGREEMENT = 0.05  # how far the kernels' sum may be from the timing for the kernels to explain it

KernelKind = Literal["product", "cast"]
DirectionName = Literal["forward", "backward"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """All events of one name in one direction.

    calls: how many there are in each pass. time_us: the time that they take together in one pass, on average.
    """

    name: str
    kind: KernelKind
    calls: int
    time_us: float


@dataclass(frozen=True, slots=True)
class Flop:
    """Floating-point operations of one direction's products, by the precision of their operands."""

    bf16: int
    float8: int

    @property
    def total(self) -> int:
        return self.bf16 + self.float8


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """The highest rates that a few runs reached. square: m, k and n of the products, which are all the same."""

    square: int
    bf16_tflop_per_s: float
    float8_tflop_per_s: float
    copy_gb_per_s: float

    def least_us(self, flop: Flop) -> float:
        """How long these products take at the ceilings."""
        return flop.bf16 / self.bf16_tflop_per_s / 1e6 + flop.float8 / self.float8_tflop_per_s / 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Direction:
    """Forward or backward of one arm. timed_us: what the timer measured, without the profiler."""

    flop: Flop
    timed_us: float
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmBreakdown:
    """Forward and backward of one arm.

    least_cast_bytes: see `Work`. rounds, profiled_rounds: how many rounds the timer and the profiler counted.
    timed_mhz, profiled_mhz: the median clocks of these two runs, None where the device does not report a clock.
    """

    name: ArmName
    forward: Direction
    backward: Direction
    least_cast_bytes: int
    rounds: int
    profiled_rounds: int
    timed_mhz: int | None
    profiled_mhz: int | None

    @property
    def directions(self) -> dict[DirectionName, Direction]:
        return {"forward": self.forward, "backward": self.backward}

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return (*self.forward.kernels, *self.backward.kernels)

    @property
    def flop(self) -> Flop:
        both = self.forward.flop, self.backward.flop
        return Flop(sum(flop.bf16 for flop in both), sum(flop.float8 for flop in both))

    def kind_us(self, kind: KernelKind) -> float:
        return sum(kernel.time_us for kernel in self.kernels if kernel.kind == kind)

    @property
    def kernels_us(self) -> float:
        return sum(kernel.time_us for kernel in self.kernels)

    @property
    def timed_us(self) -> float:
        return self.forward.timed_us + self.backward.timed_us

    @property
    def gaps_us(self) -> float:
        """The part of the timing in which no kernel runs.

        Below 0, kernels overlap, or they ran slower while they were profiled.
        """
        return self.timed_us - self.kernels_us

    @property
    def apart(self) -> float:
        """How far the kernels' sum is from the timing: 0.01 means 1 % above it."""
        return self.kernels_us / self.timed_us - 1

    @property
    def adds_up(self) -> bool:
        return abs(self.apart) <= AGREEMENT


@dataclass(frozen=True, kw_only=True, slots=True)
class Breakdown:
    """Both arms of one linear."""

    shape: LinearShape
    variant: Variant
    device: str
    ceilings: Ceilings
    bf16: ArmBreakdown
    float8: ArmBreakdown

    @property
    def arms(self) -> tuple[ArmBreakdown, ArmBreakdown]:
        return self.bf16, self.float8

    @property
    def has_findings(self) -> bool:
        """Whether the kernels of an arm do not explain its timing."""
        return not all(arm.adds_up for arm in self.arms)
