"""Are the kernels' forms equal, bit for bit, to those of torchao's casts? On special values, powers of two off and on.

In: a device, and the shape of an operand. Out: for each case how many scales and how many float8 numbers differ.
A NaN equals any NaN: which one comes out depends on the processor, and products do not distinguish them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rowwise_casts_kernels import panel_column_form, rows_first_forms, strip_column_form, two_pass_forms
from rowwise_casts_torchao import torchao_forms

from fp8gate.casts.operand import Form

FLOAT8_NAN = 0x7F


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """How many scales and data of one form differ from torchao's."""

    case: str
    powers_of_two: bool
    method: str
    form: str
    m: int
    k: int
    different_scales: int
    different_data: int

    @property
    def equal(self) -> bool:
        return not (self.different_scales or self.different_data)


def special_operands(m: int, k: int, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Operands by name. What is random is so on the CPU, from a fixed seed: the same on every device."""
    draw = torch.Generator().manual_seed(27)
    normal = torch.randn(m, k, generator=draw)
    rows, columns = torch.arange(m)[:, None], torch.arange(k)[None, :]
    tiny = torch.finfo(torch.bfloat16).tiny
    cases = {
        "random": normal,
        "zeros": torch.zeros(m, k),
        "negative zeros": -torch.zeros(m, k),
        "zeros among rows and columns": normal * (rows % 3 > 0) * (columns % 5 > 0),
        "sizes from 1e-30 to 1e30": normal * 10.0 ** ((rows + columns) % 61 - 30),
        "denormals alone": normal * tiny / 64,
        "denormals among others": torch.where((rows + columns) % 7 == 0, normal, normal * tiny / 64),
        "around the least amax, 1e-12": normal * 1e-12,
        "very large rows": torch.where(rows % 16 == 3, normal.sign() * 3.3e38, normal),
        "infinities": torch.where((rows % 32 == 5) & (columns % 48 == 7), normal.sign() * torch.inf, normal),
        "NaNs": torch.where((rows % 32 == 9) & (columns % 48 == 11), torch.nan, normal),
    }
    for name, values in cases.items():
        yield name, values.bfloat16().to(device)


def every_magnitude(device: torch.device) -> torch.Tensor:
    """All bf16 numbers of positive sign, NaNs included, each the largest of a row of its own."""
    operand = torch.zeros(1 << 15, 16, dtype=torch.bfloat16)
    operand[:, 3] = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return operand.to(device)


def compare_forms(case: str, x: torch.Tensor, *, powers_of_two: bool) -> Iterator[Comparison]:
    """Every way that the kernels take, beside torchao's casts as they are."""
    theirs = torchao_forms("both", powers_of_two=powers_of_two)(x)
    expected = {"row": Form(data=theirs[0], scale=theirs[1]), "column": Form(data=theirs[2], scale=theirs[3])}
    for method, cast in kernel_casts(powers_of_two).items():
        for form, found in cast(x).items():
            different = differences(found, expected[form])
            m, k = x.shape
            yield Comparison(
                case=case,
                powers_of_two=powers_of_two,
                method=method,
                form=form,
                m=m,
                k=k,
                different_scales=different[0],
                different_data=different[1],
            )


def kernel_casts(powers_of_two: bool) -> dict[str, Callable[[torch.Tensor], dict[str, Form]]]:
    def two_passes(x: torch.Tensor) -> dict[str, Form]:
        row, column = two_pass_forms(x, powers_of_two=powers_of_two)
        return {"column": column} if row is None else {"row": row, "column": column}

    def column_alone(x: torch.Tensor) -> dict[str, Form]:
        return {"column": two_pass_forms(x, powers_of_two=powers_of_two, row_form=False)[1]}

    def rows_first(x: torch.Tensor) -> dict[str, Form]:
        row, column = rows_first_forms(x, powers_of_two=powers_of_two)
        return {"row": row, "column": column}

    def strip(x: torch.Tensor) -> dict[str, Form]:
        return {"column": strip_column_form(x, powers_of_two=powers_of_two)}

    def panels(x: torch.Tensor) -> dict[str, Form]:
        return {"column": panel_column_form(x, powers_of_two=powers_of_two)}

    return {
        "two passes": two_passes,
        "two passes, column": column_alone,
        "rows first": rows_first,
        "strip": strip,
        "panels": panels,
    }


def differences(found: Form, expected: Form) -> tuple[int, int]:
    """How many scales and how many data differ; ValueError if shapes or layouts do."""
    for ours, theirs in ((found.data, expected.data), (found.scale, expected.scale)):
        if ours.shape != theirs.shape or ours.stride() != theirs.stride():
            raise ValueError(f"shape {(*ours.shape,)} {ours.stride()}, torchao's {(*theirs.shape,)} {theirs.stride()}")
    bits, expected_bits = found.data.view(torch.uint8), expected.data.view(torch.uint8)
    both_nan = ((bits & FLOAT8_NAN) == FLOAT8_NAN) & ((expected_bits & FLOAT8_NAN) == FLOAT8_NAN)
    data = (bits != expected_bits) & ~both_nan
    scales = found.scale.view(torch.int32) != expected.scale.view(torch.int32)
    scales &= ~(found.scale.isnan() & expected.scale.isnan())
    return int(scales.sum()), int(data.sum())


def unequal(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> list[tuple[int, int]]:
    """For each form, given as its data and its scale in turn, how many scales and data differ."""
    return [
        differences(Form(data=found[i], scale=found[i + 1]), Form(data=expected[i], scale=expected[i + 1]))
        for i in range(0, len(expected), 2)
    ]


def all_equal(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return all(counts == (0, 0) for counts in unequal(found, expected))
