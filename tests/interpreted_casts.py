"""Runs the kernels that cast in Triton's interpreter, and prints what differs from torchao.

A process of its own: Triton reads TRITON_INTERPRET as it is imported. tests/test_rowwise_casts.py starts it and reads
its lines: each is a JSON list of the test that it belongs to, what was compared, scales and data that differ.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import rowwise_casts_launches
import rowwise_casts_timing
import torch
from rowwise_casts_equality import compare_forms, differences, every_magnitude, special_operands
from rowwise_casts_kernels import RowLaunch, cast_rows, panel_column_form, strip_column_form
from rowwise_casts_torchao import torchao_forms

from fp8gate.casts import operators
from fp8gate.casts.operand import Form, Launch

CPU = torch.device("cpu")
SPECIAL_SIZE = (48, 80)
"""In one block of every kernel, and filling none."""
MANY_BLOCKS = (272, 144)


WITHOUT_POWERS = ("random", "around the least amax, 1e-12", "infinities", "NaNs")
"""Scales alone depend on powers of two, and `every_magnitude` compares all of these."""


def main() -> None:
    for case, x in special_operands(*SPECIAL_SIZE, CPU):
        compare("special", f"{case}, powers of two on", x, powers_of_two=True)
        if case in WITHOUT_POWERS:
            compare("special", f"{case}, powers of two off", x, powers_of_two=False)
    compare("blocks", "random", dict(special_operands(*MANY_BLOCKS, CPU))["random"], powers_of_two=True)
    compare_strip_of_many_blocks()
    compare_many_panels()
    compare_every_magnitude(powers_of_two=True)
    compare_every_magnitude(powers_of_two=False)
    compare_operators()
    compare_given_scales()
    time_every_launch()


def report(test: str, compared: str, scales: int, data: int) -> None:
    print(json.dumps([test, compared, scales, data]), flush=True)


def compare(test: str, case: str, x: torch.Tensor, *, powers_of_two: bool) -> None:
    for found in compare_forms(case, x, powers_of_two=powers_of_two):
        report(test, f"{case}, {found.method}, {found.form}", found.different_scales, found.different_data)


def compare_every_magnitude(*, powers_of_two: bool) -> None:
    x = every_magnitude(CPU)
    data, scale = torchao_forms("row", powers_of_two=powers_of_two)(x)
    form, _ = cast_rows(x, powers_of_two=powers_of_two, launch=RowLaunch(elements=1 << 16, walk=1 << 13, warps=4))
    report("magnitudes", f"powers of two: {powers_of_two}", *differences(form, Form(data=data, scale=scale)))


def compare_many_panels() -> None:
    """Nine panels of one tile across, five of two, and a single one."""
    x = dict(special_operands(*MANY_BLOCKS, CPU))["random"]
    data, scale = torchao_forms("column", powers_of_two=True)(x)
    for columns in (16, 32, 256):
        launch = Launch(rows=64, columns=16, walk=128, warps=4, panel_bytes=2 * x.shape[0] * columns)
        form = panel_column_form(x, powers_of_two=True, launch=launch)
        report("blocks", f"panels of {columns} columns", *differences(form, Form(data=data, scale=scale)))


def compare_strip_of_many_blocks() -> None:
    x = dict(special_operands(*MANY_BLOCKS, CPU))["random"]
    data, scale = torchao_forms("column", powers_of_two=True)(x)
    form = strip_column_form(x, powers_of_two=True, launch=Launch(rows=64, columns=32, warps=4))
    report("blocks", "strip of five blocks", *differences(form, Form(data=data, scale=scale)))


def compare_operators() -> None:
    """What the operators of fp8gate.casts.operators launch on CUDA, with what they compute on a CPU."""
    ways = {
        "both forms": (operators.both_forms_by_kernels, operators.both_forms_by_torch),
        "column form": (operators.column_form_by_kernel, operators.column_form_by_torch),
    }
    for case, x in special_operands(*SPECIAL_SIZE, CPU):
        for forms, (by_kernels, by_torch) in ways.items():
            *data, bits = by_kernels(x, True)
            *expected_data, expected_bits = by_torch(x, True)
            for i, (one, other) in enumerate(zip(data, expected_data, strict=True)):
                found = Form(data=one, scale=amaxes(bits))
                expected = Form(data=other, scale=amaxes(expected_bits))
                report("operators", f"{case}, {forms}, data {i}", *differences(found, expected))


def compare_given_scales() -> None:
    """The operator that is given scales, with those of the operand, and with larger ones."""
    for case, x in special_operands(*MANY_BLOCKS, CPU):
        right = torchao_forms("column", powers_of_two=True)(x)[1].flatten()
        for name, scales in {"right": right, "too large": right * 3}.items():
            found, expected = (
                Form(data=cast(x, scales), scale=scales)
                for cast in (operators.column_form_with_scales_by_kernel, operators.column_form_with_scales_by_torch)
            )
            report("given scales", f"{case}, {name}", *differences(found, expected))


def amaxes(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int16).view(torch.bfloat16).float()


def time_every_launch() -> None:
    """The benchmark's own sweep, with a timer that only runs each cast."""

    def run_once(cast, operands):
        cast(*operands[0])
        return (1.0,)

    rowwise_casts_launches.sample_us = run_once
    rowwise_casts_timing.ROTATED_BYTES = 1
    operands = rowwise_casts_timing.random_operands(*SPECIAL_SIZE, CPU)
    for timing in rowwise_casts_launches.KernelSweep(operands=operands, powers_of_two=True).timings():
        if not timing.part_of_cast:
            report("launches", f"{timing.form}, {timing.method}, {timing.launch}", 0, int(not timing.equal))


if __name__ == "__main__":
    main()
