"""Which of the measured sets of a block to convert, for the search and for the filter. Pure.

In: the speedups of sets, with bounds. Out: the set that trains fastest, or bf16.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from math import log
from typing import NamedTuple

WORTH = 1.0005  # a plan's numbers have four digits: the last one must show that the choice is above 1


class MeasuredSet(NamedTuple):
    """A set of roles and bf16 time / its time.

    is_final: it has the visits that decide, and not the screening alone. is_screened: it has all visits of the
    screening.
    """

    convert: Collection[str]
    speedup: float
    speedup_low: float
    is_final: bool
    is_screened: bool = True


BF16 = MeasuredSet((), 1.0, 1.0, is_final=True)


def fastest(sets: Iterable[MeasuredSet], *, noise: float) -> MeasuredSet:
    """bf16, unless the lower bound of another set lies above it; of equals the smallest.

    Final visits decide, as the screening favours the sets that it ranks first. A set that was only screened is taken if
    it gains more than the noise over the fastest of the others. One that was visited less often, as a search that was
    stopped leaves them, is taken only if no other does: it may owe all to a round in which bf16 was slow.
    """
    worth = [BF16, *(one for one in sets if one.speedup_low >= WORTH)]
    best = max((one for one in worth if one.is_final), key=_rank)
    others = (one for one in worth if not one.is_final and gains(log(one.speedup), log(best.speedup), noise=noise))
    return max(others, default=best, key=lambda one: (one.is_screened, _rank(one)))


def gains(value: float, over: float, *, noise: float) -> bool:
    """Whether a set is faster than another by more than the noise. value, over: ln(bf16 / time) of the two."""
    return value > over + noise


def _rank(one: MeasuredSet) -> tuple[float, int]:
    return one.speedup, -len(one.convert)
