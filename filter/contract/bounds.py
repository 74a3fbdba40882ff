"""What the bounds of a table's rows cover: what varies within one run, and what differs from run to run. Pure.

Half widths are those of ln(speedup): 0.05 is 5 %. A row's bound is the root of the squares of three parts: what varies
within its own run, what repeats differ by (`RunBounds.between`), and what boards differ by (`Bounds.between_boards`).
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

from fp8gate.filter.contract.reading.plain_values import MAX_SIZE

SMALL_US = 120.0
"""Points whose bf16 takes less, forward plus backward, differ more from run to run: by up to twice as much on an H200
(`python benchmarks/two_sweeps.py`). The two classes of `Bounds` have it in their names."""
COVERAGE = 0.95
Count = Annotated[int, msgspec.Meta(gt=0, le=MAX_SIZE)]
Share = Annotated[float, msgspec.Meta(ge=0)]
BoardConstant = Annotated[float, msgspec.Meta(gt=0, le=100)]  # beyond that, it is none that was measured


class RunBounds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bounds of the points of one class.

    coverage: the share of the points at which another sweep lies within the bounds of this one, as far as so many
    repeats can show it: `repeats` / (`repeats` + 1), at most 0.95. within: the median half width of what varies within
    one run. between: the half width of what repeats differ by from run to run, the same for every row.
    repeats: how many points were measured again by another process. With fewer than 19, `between` is the largest
    difference seen, or what devices of this kind are known for where that is more.
    """

    coverage: Annotated[float, msgspec.Meta(ge=0, lt=1)]
    within: Share
    between: Share
    repeats: Annotated[int, msgspec.Meta(ge=0)]


class Bounds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """By how long bf16 takes, forward plus backward. A class without points is not there.

    board_us: all arms may take so many microseconds more or less on another board in each direction, forward and
    backward, whatever runs. Repeats on one board cannot show it. None: the bounds have no such part.
    """

    below_120_us: RunBounds | None = None
    from_120_us: RunBounds | None = None
    board_us: BoardConstant | None = None

    def of(self, bf16_us: float) -> RunBounds | None:
        return self.below_120_us if is_small(bf16_us) else self.from_120_us

    def between_runs(self, bf16_us: float, fp8_us: float) -> tuple[float, float]:
        """Half widths of all that differs from run to run, below and above a row's speedup. In: its total times."""
        part = self.of(bf16_us)
        between = part.between if part else 0.0
        below, above = self.between_boards(bf16_us, fp8_us)
        return math.hypot(between, below), math.hypot(between, above)

    def between_boards(self, bf16_us: float, fp8_us: float) -> tuple[float, float]:
        """The part of `between_runs` that is the boards': how far ln(speedup) moves with board_us more, and with less.

        More brings a speedup nearer to 1, less takes it further away. Where no time would be left with less, it counts
        as much as more.
        """
        both_us = 2 * (self.board_us or 0.0)  # forward and backward
        moves = [
            math.log((bf16_us + us) / (fp8_us + us)) - math.log(bf16_us / fp8_us)
            for us in (both_us, -both_us)
            if min(bf16_us, fp8_us) + us > 0
        ]
        if len(moves) == 1:
            moves.append(-moves[0])
        return max(0.0, -min(moves)), max(0.0, *moves)


def is_small(bf16_us: float) -> bool:
    return bf16_us < SMALL_US


def without_part(half: float, part: float) -> float:
    """A half width without one of its parts; without what differs between runs, it is what varies within one."""
    return math.sqrt(max(0.0, half**2 - part**2))


class Spread(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far measurements of the same points differed: quantiles of |ratio of the speedups - 1|.

    points: how many points were measured more than once.
    """

    points: Count
    median: Annotated[float, msgspec.Meta(ge=0)]
    p95: Annotated[float, msgspec.Meta(ge=0)]
    worst: Annotated[float, msgspec.Meta(ge=0)]


class Unaligned(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What becomes of a speedup where the tokens are no multiple of 128, as the points around such a shape are.

    points: how many points near break-even were measured with 16 tokens fewer too. factor: the median of the speedup
    with fewer tokens over that of the point.
    """

    points: Count
    factor: Annotated[float, msgspec.Meta(ge=0.1, le=10)]  # beyond that, it is no number that was measured
