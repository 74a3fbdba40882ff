"""What a table says about one shape: times, a speedup with bounds, and where they come from. Pure."""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from fp8gate.filter.contract.shapes import TOKEN_TILE
from fp8gate.filter.contract.table import Point, Status

OF_ALIGNED = f"multiples of {TOKEN_TILE} tokens, with which float8 is 1 to 9 % faster"
"""What an answer with `unaligned` None is of. Source: the medians of the recipes, of shapes off the grids of an H100
and of an H200 (`python benchmarks/unaligned_tokens.py`, "others")."""
MAX_OCTAVES_OUTSIDE = math.log2(10)
"""Farther outside of what was measured, the border's answer says nothing: ten times as large in one dimension. Heads of
large vocabularies lie within it (262208 rows of Gemma 3's weight, where 32768 were measured)."""


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """Forward + backward of one shape, from the table. Times are in microseconds.

    point: the nearest measured point. distance: how far it is, in octaves (Euclidean, log2 per axis; 0 = exact,
    1 = one dimension twice as large). outside: the shape was not measured and is outside the measured part of the grid
    (without a grid, outside of all points). gap: the status of an even nearer point that has no numbers, or None.
    octaves_outside: how far the shape is outside of the sizes that were measured, along the farthest axis. trend:
    the factor by which the speedup falls from the border on, if it goes on falling as it did up to there; 1 if it rises
    or the shape is inside, None if the table does not tell. The speedup and its low bound have it in them.
    from_tokens: a smaller number of tokens whose speedup is used, because the shape's own tokens were not measured
    around its k and n; or None. is_proven: False only in an incomplete table, without any measured point that is at
    most as large as the shape in every size: the win of a larger one says nothing then. unaligned: the factor that the
    speedup, its bounds and the float8 times have in them, as the tokens are no multiple of 128; None if the table does
    not state it. forwards: how often the forward runs. is_frozen: the weight needs no gradient. bounds_cover: what the
    bounds cover, "" for whatever another sweep measures.
    """

    speedup: float
    speedup_low: float
    speedup_high: float
    bf16_fwd_us: float
    bf16_bwd_us: float
    fp8_fwd_us: float
    fp8_bwd_us: float
    point: Point
    distance: float
    outside: bool
    gap: Status | None
    interpolated: bool
    octaves_outside: float = 0.0
    trend: float | None = 1.0
    from_tokens: int | None = None
    is_proven: bool = True
    unaligned: float | None = 1.0
    forwards: int = 1
    is_frozen: bool = False
    bounds_cover: Literal["", "within one run"] = "within one run"

    @property
    def is_far_outside(self) -> bool:
        return self.octaves_outside > MAX_OCTAVES_OUTSIDE

    @property
    def bf16_us(self) -> float:
        return self.forwards * self.bf16_fwd_us + self.bf16_bwd_us

    @property
    def fp8_us(self) -> float:
        """The bf16 time over the speedup, and so consistent with the decision, unlike the sum of the float8 medians."""
        return self.bf16_us / self.speedup

    def is_unsure(self, min_speedup: float) -> bool:
        """Whether it lies outside, and the border's answer is not that of the trend, or there is none.

        What is not proven is unsure only where it would win.
        """
        if not self.outside:
            return False
        if not self.is_proven and self.speedup >= min_speedup:
            return True
        if self.trend is None or self.is_far_outside:
            return True
        return self.speedup < min_speedup <= self.speedup / self.trend

    def with_unaligned_tokens(self, factor: float | None) -> Estimate:
        """The estimate for tokens that are no multiple of 128, from one for tokens that are. Only float8 changes.

        factor: of the speedup, None if the table does not state it. Then nothing changes.
        """
        if factor is None:
            return msgspec.structs.replace(self, unaligned=None)
        fp8_fwd_us, fp8_bwd_us = self.fp8_fwd_us / factor, self.fp8_bwd_us / factor
        return self._changed_by(factor, fp8_fwd_us=fp8_fwd_us, fp8_bwd_us=fp8_bwd_us, unaligned=factor)

    def recomputed(self) -> Estimate:
        """The estimate under activation checkpointing, which runs the forward twice in both precisions.

        The speedup and its bounds change by the same factor as the quotient of the summed times.
        """
        once, twice = (
            (n * self.bf16_fwd_us + self.bf16_bwd_us) / (n * self.fp8_fwd_us + self.fp8_bwd_us) for n in (1, 2)
        )
        return self._changed_by(twice / once, forwards=2)

    def frozen(self) -> Estimate:
        """The estimate where the weight needs no gradient: what float8 gains at least, as the table has no such column.

        In bf16 both gradients take the same FLOP, so half of the backward is left. In float8 the product that is left
        out takes at least half of its bf16 time, a quarter of the bf16 backward, and its casts are not counted.
        """
        bf16_bwd_us = self.bf16_bwd_us / 2
        fp8_bwd_us = max(self.fp8_bwd_us - self.bf16_bwd_us / 4, self.fp8_bwd_us / 2)
        before = self.bf16_us / (self.forwards * self.fp8_fwd_us + self.fp8_bwd_us)
        after = (self.forwards * self.bf16_fwd_us + bf16_bwd_us) / (self.forwards * self.fp8_fwd_us + fp8_bwd_us)
        return self._changed_by(after / before, bf16_bwd_us=bf16_bwd_us, fp8_bwd_us=fp8_bwd_us, is_frozen=True)

    def _changed_by(self, factor: float, **fields: Any) -> Estimate:
        """The estimate with other fields, its speedup and bounds multiplied by the factor that these change it by."""
        bounds = {name: getattr(self, name) * factor for name in ("speedup", "speedup_low", "speedup_high")}
        return msgspec.structs.replace(self, **bounds, **fields)
