"""A breakdown in one sentence: what float8 saves, what it costs, and how the two arms compare. Pure.

In: a `Breakdown`. Out: the title, and the sentence with its two halves, which the text, the JSON and the picture share.
"""

from __future__ import annotations

from fp8gate.calibrate.breakdown.breakdown_record import Breakdown


def title(breakdown: Breakdown) -> str:
    return f"{breakdown.shape} {breakdown.variant}, {breakdown.device}"


def sentence(breakdown: Breakdown) -> str:
    """What float8 saves and costs against bf16, then the outcome."""
    return f"{reasons(breakdown)}: {outcome(breakdown)}"


def reasons(breakdown: Breakdown) -> str:
    """What the products, the casts and the gaps save or cost. Together they are the difference of the two timings."""
    bf16, float8 = breakdown.bf16, breakdown.float8
    saved_us = {
        "the products": bf16.kind_us("product") - float8.kind_us("product"),
        "the casts": bf16.kind_us("cast") - float8.kind_us("cast"),
        "the gaps between kernels": bf16.gaps_us - float8.gaps_us,
    }
    return ", ".join(f"{part} {'save' if us >= 0 else 'cost'} {abs(us):.0f} us" for part, us in saved_us.items())


def outcome(breakdown: Breakdown) -> str:
    """How the time of the float8 arm compares with that of bf16."""
    return (
        f"{breakdown.variant.recipe} takes {breakdown.float8.timed_us / breakdown.bf16.timed_us:.2f} times bf16's time"
    )
