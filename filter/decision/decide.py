"""The decision for one layer, and the reason that is kept with it. Pure."""

from __future__ import annotations

import msgspec

from fp8gate.filter.contract.shapes import TOKEN_TILE, LinearShape, RowSource
from fp8gate.filter.contract.table import Point, Status
from fp8gate.filter.decision.estimate import Estimate
from fp8gate.filter.decision.lookup import Lookup

DEFAULT_MIN_SPEEDUP = 1.05
"""A layer that wins by little is better left alone: it saves little of its block's time, but changes what the layers
around it cost. It holds for linears with an input of their own: see `shared_input`. What is known of these comes from
output projections near 1.0x in five blocks (`python benchmarks/plan_choices.py`): converting them costs up to 1.4 % of
the block and gains up to 0.3 %."""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """Whether one linear is converted to float8, and why.

    speedup and its bounds: float8 against bf16 for `shape`, which is (m, k, n) as one rank holds the linear. They are
    None if no number was needed, or if the table has none. digits: after the point of the speedup, as many as show on
    which side of `min_speedup` it is. reason: does not repeat the speedup. point, distance, outside, gap,
    unaligned: see `Estimate`. is_unsure: outside, and the answer may be another than the border's. rows_from: what says
    how many rows the linear multiplies. planned: a plan decided. Its reason then gives the speedup of the whole block.
    """

    convert: bool
    reason: str
    shape: LinearShape | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    digits: int = 2
    point: Point | None = None
    distance: float | None = None
    outside: bool = False
    is_unsure: bool = False
    gap: Status | None = None
    unaligned: float | None = 1.0
    rows_from: RowSource = "tokens"
    planned: bool = False

    @property
    def speedup_text(self) -> str:
        """ "1.04x", or nothing without a speedup."""
        return "" if self.speedup is None else f"{self.speedup:.{self.digits}f}x"

    @property
    def m(self) -> int | None:
        return self.shape.m if self.shape else None

    @property
    def k(self) -> int | None:
        return self.shape.k if self.shape else None

    @property
    def n(self) -> int | None:
        return self.shape.n if self.shape else None


def decide(
    shape: LinearShape, lookup: Lookup, *, min_speedup: float, recomputed: bool = False, is_frozen: bool = False
) -> Decision:
    """Choose float8 only if it was measured to win by `min_speedup`.

    recomputed: the layer's forward runs twice. is_frozen: its weight needs no gradient.
    """
    indivisible = shape.indivisible()
    if indivisible:
        return Decision(convert=False, shape=shape, reason=f"{indivisible}: not a multiple of 16")
    estimate = lookup(shape)
    if estimate is None:
        gap = next((point.status for point in lookup.table.points), None)
        return Decision(convert=False, shape=shape, reason="the table holds no measured point", gap=gap)
    if estimate.is_far_outside:
        away = f"{2**estimate.octaves_outside:.0f} times outside what was measured: too far to tell"
        return Decision(convert=False, shape=shape, reason=away, point=estimate.point, outside=True, is_unsure=True)
    estimate = estimate.recomputed() if recomputed else estimate
    return _judge(shape, estimate.frozen() if is_frozen else estimate, min_speedup)


def _judge(shape: LinearShape, estimate: Estimate, min_speedup: float) -> Decision:
    wins = estimate.speedup >= min_speedup
    has_failed = estimate.gap == "failed"
    digits = _digits(estimate, min_speedup)
    verdict = [] if wins else [f"below {min_speedup:.{digits}f}x"]
    if has_failed:
        verdict = ["float8 failed at the nearest point"]  # a fast neighbour does not make a wrong result right
    elif wins and not estimate.is_proven:
        verdict = ["no shape as small was measured yet"]
    return Decision(
        convert=wins and not has_failed and estimate.is_proven,
        reason=", ".join([*verdict, *_provenance(estimate, min_speedup)]),
        shape=shape,
        digits=digits,
        speedup=estimate.speedup,
        speedup_low=estimate.speedup_low,
        speedup_high=estimate.speedup_high,
        point=estimate.point,
        distance=estimate.distance,
        outside=estimate.outside,
        is_unsure=estimate.is_unsure(min_speedup),
        gap=estimate.gap,
        unaligned=estimate.unaligned,
    )


def _digits(estimate: Estimate, min_speedup: float) -> int:
    """Digits after the point: 4 if 2 would print "1.02x, below 1.02x" or "bounds 1.02 to 1.02", else 2."""
    low, speedup, high = (round(x, 2) for x in (estimate.speedup_low, estimate.speedup, estimate.speedup_high))
    is_below = estimate.speedup < min_speedup
    looks_equal = (is_below and speedup >= round(min_speedup, 2)) or (_straddles(estimate, min_speedup) and low == high)
    return 4 if looks_equal else 2


def _straddles(estimate: Estimate, min_speedup: float) -> bool:
    return estimate.speedup_low < min_speedup <= estimate.speedup_high


def _provenance(estimate: Estimate, min_speedup: float) -> list[str]:
    """How the number was found: "measured", or "nearest (8192, 4096, 1024)", or "interpolated", and its doubts."""
    if estimate.distance == 0:
        parts = ["measured"]
    elif estimate.interpolated:
        parts = ["interpolated"]
    else:
        parts = [f"nearest {estimate.point.shape}"]
    if estimate.unaligned is None:
        parts.append(f"from multiples of {TOKEN_TILE} tokens")
    elif estimate.unaligned != 1:
        parts.append(f"times {estimate.unaligned:.2f} as the tokens are no multiple of {TOKEN_TILE}")
    if estimate.from_tokens:
        parts.append(f"from {estimate.from_tokens} tokens")
    if estimate.outside:
        parts.append("outside the measured range")
    if estimate.point.status == "ambiguous":
        parts.append("ambiguous")
    if _straddles(estimate, min_speedup) and not estimate.outside:
        digits = _digits(estimate, min_speedup)
        bounds = f"bounds {estimate.speedup_low:.{digits}f} to {estimate.speedup_high:.{digits}f}"
        parts.append(f"{bounds} {estimate.bounds_cover}".rstrip())
    if estimate.forwards > 1:
        parts.append("recomputed")
    if estimate.is_frozen:
        parts.append("at least, as the weight is frozen")
    if estimate.gap:
        parts.append(f"a nearer point is {estimate.gap}")
    return parts
