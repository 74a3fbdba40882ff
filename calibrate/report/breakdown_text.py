"""A breakdown as text for a terminal, and as JSON for programs. Pure."""

from __future__ import annotations

from typing import Any

from fp8gate.calibrate.breakdown.breakdown_record import AGREEMENT, ArmBreakdown, Breakdown, Kernel
from fp8gate.calibrate.breakdown.story import sentence, title
from fp8gate.filter.contract.recipes import casts_json
from fp8gate.filter.terminal_table import Align, render_table

NAME_LENGTH = 72
"""The most characters of a kernel's name in the table. The names of CUTLASS's templates have hundreds; the JSON gives
them in full."""
SMALL_RATE = 10.0  # rates below are shown with two decimals: those of a CPU


def breakdown_text(breakdown: Breakdown) -> str:
    """Say why float8 wins or loses, then list the kernels, what each arm reaches, and whether the parts add up."""
    ceilings = breakdown.ceilings
    return "\n\n".join(
        [
            f"{title(breakdown)}: forward and backward, cold cache, each arm alone",
            sentence(breakdown),
            _kernels_table(breakdown),
            _arms_table(breakdown),
            f"ceilings, the best of a few runs at the highest clock: a product of {ceilings.square}^3 "
            f"{_rate(ceilings.bf16_tflop_per_s)} TFLOP/s in bf16, {_rate(ceilings.float8_tflop_per_s)} in float8; "
            f"a copy {_rate(ceilings.copy_gb_per_s)} GB/s\n"
            "GB/s of casts: at least; the operands read once and each float8 version written once\n"
            "gaps: the timing less the kernels; below 0 they overlap, or ran slower when profiled",
            "\n".join(_sum_sentence(arm) for arm in breakdown.arms),
        ]
    )


def breakdown_json(breakdown: Breakdown) -> dict[str, Any]:
    shape, ceilings = breakdown.shape, breakdown.ceilings
    return {
        "m": shape.m,
        "k": shape.k,
        "n": shape.n,
        "recipe": breakdown.variant.recipe,
        **casts_json(breakdown.variant),
        "device": breakdown.device,
        "sentence": sentence(breakdown),
        "findings": breakdown.has_findings,
        "ceilings": {
            "square": ceilings.square,
            "bf16_tflop_per_s": ceilings.bf16_tflop_per_s,
            "float8_tflop_per_s": ceilings.float8_tflop_per_s,
            "copy_gb_per_s": ceilings.copy_gb_per_s,
        },
        "arms": [_arm_json(arm, breakdown) for arm in breakdown.arms],
    }


def _kernels_table(breakdown: Breakdown) -> str:
    rows = [
        (
            arm.name,
            direction,
            _short(kernel.name),
            kernel.kind,
            kernel.calls,
            f"{kernel.time_us:.1f}",
            f"{kernel.time_us / arm.timed_us:.1%}",
        )
        for arm in breakdown.arms
        for direction, part in arm.directions.items()
        for kernel in part.kernels
    ]
    headers = ("arm", "direction", "kernel", "kind", "calls", "us", "of timed")
    return render_table(headers, rows)


def _arms_table(breakdown: Breakdown) -> str:
    headers = (
        "arm",
        "products us",
        "TFLOP/s",
        "of ceiling",
        "casts us",
        "GB/s",
        "of a copy",
        "gaps us",
        "timed us",
        "MHz timed",
        "profiled",
    )
    align: list[Align] = ["right"] * len(headers)
    align[0] = "left"
    rows = [_arm_row(arm, breakdown) for arm in breakdown.arms]
    return render_table(headers, rows, align=align)


def _arm_row(arm: ArmBreakdown, breakdown: Breakdown) -> tuple[str, ...]:
    reached = _reached(arm, breakdown)
    return (
        arm.name,
        f"{arm.kind_us('product'):.1f}",
        _rate(reached["product_tflop_per_s"]),
        _or_dash(reached["of_product_ceiling"], ".0%"),
        f"{arm.kind_us('cast'):.1f}",
        _rate(reached["cast_gb_per_s_at_least"]),
        _or_dash(reached["of_copy_ceiling_at_least"], ".0%"),
        f"{arm.gaps_us:.1f}",
        f"{arm.timed_us:.1f}",
        _or_dash(arm.timed_mhz, "d"),
        _or_dash(arm.profiled_mhz, "d"),
    )


def _reached(arm: ArmBreakdown, breakdown: Breakdown) -> dict[str, float | None]:
    """The rates of an arm, alone and as a share of the ceilings.

    None if the arm has no such kernel, or needs no cast.
    """
    products_us, casts_us = arm.kind_us("product"), arm.kind_us("cast")
    casts_gb_per_s = arm.least_cast_bytes / casts_us / 1e3 if casts_us and arm.least_cast_bytes else None
    ceilings = breakdown.ceilings
    return {
        "product_tflop_per_s": arm.flop.total / products_us / 1e6 if products_us else None,
        "of_product_ceiling": ceilings.least_us(arm.flop) / products_us if products_us else None,
        "cast_gb_per_s_at_least": casts_gb_per_s,
        "of_copy_ceiling_at_least": casts_gb_per_s / ceilings.copy_gb_per_s if casts_gb_per_s else None,
    }


def _sum_sentence(arm: ArmBreakdown) -> str:
    verdict = "" if arm.adds_up else f", more than {AGREEMENT:.0%}: the parts do not explain the whole"
    return (
        f"{arm.name}: kernels sum to {arm.kernels_us:.1f} us, timed {arm.timed_us:.1f} us, "
        f"{abs(arm.apart):.1%} apart{verdict}"
    )


def _arm_json(arm: ArmBreakdown, breakdown: Breakdown) -> dict[str, Any]:
    return {
        "arm": arm.name,
        "timed_us": arm.timed_us,
        "kernels_us": arm.kernels_us,
        "products_us": arm.kind_us("product"),
        "casts_us": arm.kind_us("cast"),
        "gaps_us": arm.gaps_us,
        "apart": arm.apart,
        "adds_up": arm.adds_up,
        "least_cast_bytes": arm.least_cast_bytes,
        **_reached(arm, breakdown),
        "rounds": arm.rounds,
        "profiled_rounds": arm.profiled_rounds,
        "timed_mhz": arm.timed_mhz,
        "profiled_mhz": arm.profiled_mhz,
        "directions": {
            name: {
                "flop": direction.flop.total,
                "timed_us": direction.timed_us,
                "kernels": [_kernel_json(kernel) for kernel in direction.kernels],
            }
            for name, direction in arm.directions.items()
        },
    }


def _kernel_json(kernel: Kernel) -> dict[str, Any]:
    return {"name": kernel.name, "kind": kernel.kind, "calls": kernel.calls, "time_us": kernel.time_us}


def _short(name: str) -> str:
    """Keep the beginning and the end of a long name, which tell most."""
    half = (NAME_LENGTH - 5) // 2
    return name if len(name) <= NAME_LENGTH else f"{name[:half]} ... {name[-half:]}"


def _rate(value: float | None) -> str:
    return _or_dash(value, ".2f" if value is not None and value < SMALL_RATE else ".0f")


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
