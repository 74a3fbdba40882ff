"""Whether the numbers of a table's row fit its status and each other: what the types of its cells cannot say. Pure."""

from __future__ import annotations

from collections.abc import Sequence

QUOTIENT_TOLERANCE = {"quotient_of_times": 0.005, "paired_rounds": 0.10}
"""How far a row's speedup may be from the quotient of the row's own times, by `protocol.estimate`. Where it is that
quotient, the rounding to 4 digits moves it by at most 0.15 %. Where it was estimated from paired rounds, all but one of
2,772 rows agree within 6 %."""


def row_problem(
    columns: Sequence[str], numbers: Sequence[float | None], status: str, estimate: str, *, is_measured: bool
) -> str | None:
    """The column that is wrong and what was expected there, or None.

    columns: of the numbers. is_measured: whether the status has numbers. A row has all its numbers or none.
    """
    there = [number for number in numbers if number is not None]
    if len(there) == (len(numbers) if is_measured else 0):
        return _speedup_problem(there, estimate) if is_measured else None
    cells = zip(columns, numbers, strict=True)
    column, number = next(cell for cell in cells if (cell[1] is None) == is_measured)
    return f".{column}: expected {'a finite number' if is_measured else 'null'} for status {status}, found {number}"


def _speedup_problem(numbers: Sequence[float], estimate: str) -> str | None:
    """The row's numbers agree with each other.

    Noise can move a paired estimate further from the quotient of the times than its tolerance. Such a row is accepted
    if its own bounds say so.
    """
    bf16_fwd_us, bf16_bwd_us, fp8_fwd_us, fp8_bwd_us, speedup, low, high = numbers
    if not low <= speedup <= high:
        return f".speedup: expected speedup_low <= speedup <= speedup_high, found {low}, {speedup}, {high}"
    bf16_us, fp8_us, tolerance = bf16_fwd_us + bf16_bwd_us, fp8_fwd_us + fp8_bwd_us, QUOTIENT_TOLERANCE[estimate]
    quotient = bf16_us / fp8_us
    is_within_bounds = estimate == "paired_rounds" and low <= quotient <= high
    if abs(speedup * fp8_us - bf16_us) <= tolerance * bf16_us or is_within_bounds:
        return None
    return (
        f".speedup: expected the quotient of the row's times, {quotient:.4g}, within {tolerance:.1%} "
        f"(protocol.estimate: {estimate}), found {speedup}"
    )
