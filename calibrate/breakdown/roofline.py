"""What the device reaches at its best: a large square product in bf16 and in float8, a large copy.

In: a timer, a device. Out: `Ceilings`, by the best of a few runs, before the power limit lowers a GPU's clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from fp8gate.calibrate.breakdown.required_work import Flop
from fp8gate.calibrate.device.timer import Timer

SQUARE = {"cuda": 8192, "cpu": 512}  # m = k = n: 1.1e12 operations keep a GPU busy for about 1.5 ms, a CPU for seconds
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}  # of the source: more than any cache


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """square: the m, k and n of the products."""

    square: int
    bf16_tflop_per_s: float
    float8_tflop_per_s: float
    copy_gb_per_s: float

    def least_us(self, flop: Flop) -> float:
        """How long these products take at the ceilings."""
        return flop.bf16 / self.bf16_tflop_per_s / 1e6 + flop.float8 / self.float8_tflop_per_s / 1e6


def measure_ceilings(timer: Timer[Any], device: torch.device) -> Ceilings:
    size = SQUARE[device.type]
    return Ceilings(
        square=size,
        bf16_tflop_per_s=_product_tflop_per_s("bf16", size, timer, device),
        float8_tflop_per_s=_product_tflop_per_s("float8", size, timer, device),
        copy_gb_per_s=_copy_gb_per_s(COPY_BYTES[device.type], timer, device),
    )


def _product_tflop_per_s(
    precision: Literal["bf16", "float8"], size: int, timer: Timer[Any], device: torch.device
) -> float:
    """Of random data: a product of zeros draws less power."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    if precision == "bf16":
        least_us = timer.least_us(lambda: torch.mm(a, b.t()))
    else:
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        least_us = timer.least_us(
            lambda: torch._scaled_mm(a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
        )
    return 2 * size**3 / least_us / 1e6


def _copy_gb_per_s(size_bytes: int, timer: Timer[Any], device: torch.device) -> float:
    """Bytes read and bytes written."""
    source = torch.zeros(size_bytes, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size_bytes / timer.least_us(lambda: target.copy_(source)) / 1e3
