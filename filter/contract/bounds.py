"""What the bounds of a table's rows cover: what varies within one run, and what differs from run to run. Pure.

Half widths are those of ln(speedup): 0.05 is 5 %. A row's bound is the root of the squares of both parts.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

SMALL_US = 120.0
"""Points whose bf16 takes less, forward plus backward, differ more from run to run: by up to twice as much on an H200
(`python benchmarks/two_sweeps.py`). The two classes of `Bounds` have it in their names."""
COVERAGE = 0.95
Share = Annotated[float, msgspec.Meta(ge=0)]


class RunBounds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bounds of the points of one class.

    coverage: the share of the points at which another sweep lies within the bounds of this one, as far as so many
    repeats can show it: `repeats` / (`repeats` + 1), at most 0.95. within: the median half width of what varies within
    one run. between: the half width of what differs from run to run, the same for every row.
    repeats: how many points were measured again by another process. With fewer than 19, `between` is the largest
    difference seen, or what devices of this kind are known for where that is more.
    """

    coverage: Annotated[float, msgspec.Meta(ge=0, lt=1)]
    within: Share
    between: Share
    repeats: Annotated[int, msgspec.Meta(ge=0)]


class Bounds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """By how long bf16 takes, forward plus backward. A class without points is not there."""

    below_120_us: RunBounds | None = None
    from_120_us: RunBounds | None = None

    def of(self, bf16_us: float) -> RunBounds | None:
        return self.below_120_us if is_small(bf16_us) else self.from_120_us


def is_small(bf16_us: float) -> bool:
    return bf16_us < SMALL_US


def without_between(half: float, between: float) -> float:
    """The part of a row's half width that varies within one run."""
    return math.sqrt(max(0.0, half**2 - between**2))
