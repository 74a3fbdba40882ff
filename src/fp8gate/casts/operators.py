"""The casts of torchao's rowwise recipe as operators of torch, for the pass to put into compiled graphs.

In: a contiguous bf16 operand (M, K). Out: float8 data, and the amaxes that they were scaled by: the bits of bf16
numbers, as int32. A graph computes its scales from amaxes, and may save the amaxes for the backward pass, so it gets
these, and keeps its own few operations from an amax to a scale.

- fp8gate::cast_both_forms: row data (M, K), column data (K, M), amaxes of the rows and then the columns (M + K,).
- fp8gate::cast_column_form: column data (K, M), amaxes of the columns (K,).
- fp8gate::cast_column_form_with_scales: column data (K, M), given the float32 scales (K,).

On CUDA they launch kernels. On a CPU they compute the same by torch's own operations, and refuse what the kernels
refuse, so that all but the kernels can be tested there. Importing this module registers them in a process; graphs from
Inductor's cache need them too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8gate.casts.operand import checked_shape

BOTH_FORMS, COLUMN_FORM = "fp8gate::cast_both_forms", "fp8gate::cast_column_form"
COLUMN_FORM_WITH_SCALES = "fp8gate::cast_column_form_with_scales"
LEAST_CAPABILITY = (8, 9)  # of an NVIDIA GPU that has the instructions to convert to float8
FLOAT8 = torch.float8_e4m3fn
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)  # kernels take a contiguous operand alone

torch.library.define(BOTH_FORMS, "(Tensor operand, bool powers_of_two) -> (Tensor, Tensor, Tensor)", tags=TAGS)
torch.library.define(COLUMN_FORM, "(Tensor operand, bool powers_of_two) -> (Tensor, Tensor)", tags=TAGS)
torch.library.define(COLUMN_FORM_WITH_SCALES, "(Tensor operand, Tensor scales) -> Tensor", tags=TAGS)


def has_operators(device: torch.device) -> bool:
    """On CPUs, and on NVIDIA GPUs that convert to float8."""
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    return device.type == "cpu"


@torch.library.register_fake(BOTH_FORMS)  # type: ignore[untyped-decorator]
def _both_forms_shapes(operand: Tensor, powers_of_two: bool) -> tuple[Tensor, Tensor, Tensor]:
    m, k = operand.shape
    bits = operand.new_empty(m + k, dtype=torch.int32)
    return operand.new_empty(m, k, dtype=FLOAT8), operand.new_empty(k, m, dtype=FLOAT8), bits


@torch.library.register_fake(COLUMN_FORM)  # type: ignore[untyped-decorator]
def _column_form_shapes(operand: Tensor, powers_of_two: bool) -> tuple[Tensor, Tensor]:
    m, k = operand.shape
    return operand.new_empty(k, m, dtype=FLOAT8), operand.new_empty(k, dtype=torch.int32)


@torch.library.register_fake(COLUMN_FORM_WITH_SCALES)  # type: ignore[untyped-decorator]
def _column_form_with_scales_shape(operand: Tensor, scales: Tensor) -> Tensor:
    m, k = operand.shape
    return operand.new_empty(k, m, dtype=FLOAT8)


def both_forms_by_kernels(operand: Tensor, powers_of_two: bool) -> tuple[Tensor, Tensor, Tensor]:
    from fp8gate.casts.two_passes import amax_bits, cast_tiles

    bits = amax_bits(operand, row_form=True)
    m, _ = operand.shape
    row, column = cast_tiles(operand, bits[:m], bits[m:], powers_of_two=powers_of_two)
    assert row, "the amaxes of rows were given"
    return row.data, column.data, bits


def column_form_by_kernel(operand: Tensor, powers_of_two: bool) -> tuple[Tensor, Tensor]:
    from fp8gate.casts.panels import column_form_and_amaxes

    column, bits = column_form_and_amaxes(operand, powers_of_two=powers_of_two)
    return column.data, bits


def column_form_with_scales_by_kernel(operand: Tensor, scales: Tensor) -> Tensor:
    from fp8gate.casts.given_scales import scaled_columns

    return scaled_columns(operand, scales)


def both_forms_by_torch(operand: Tensor, powers_of_two: bool) -> tuple[Tensor, Tensor, Tensor]:
    checked_shape(operand)
    row_data, row_amax = _cast(operand, 1, powers_of_two)
    column_data, column_amax = _cast(operand, 0, powers_of_two)
    return row_data, column_data.t().contiguous(), torch.cat([_bits(row_amax), _bits(column_amax)])


def column_form_by_torch(operand: Tensor, powers_of_two: bool) -> tuple[Tensor, Tensor]:
    checked_shape(operand)
    data, amax = _cast(operand, 0, powers_of_two)
    return data.t().contiguous(), _bits(amax)


def column_form_with_scales_by_torch(operand: Tensor, scales: Tensor) -> Tensor:
    checked_shape(operand)
    return _scaled(operand, scales).t().contiguous()


def _cast(operand: Tensor, dim: int, powers_of_two: bool) -> tuple[Tensor, Tensor]:
    """torchao's cast with one scale for all along a dimension (float8_utils.py), and the amaxes."""
    amax = operand.abs().amax(dim, keepdim=True)
    scale = (448.0 / amax.double().clamp(min=1e-12)).float()
    if powers_of_two:
        scale = scale.log2().floor().exp2()
    return _scaled(operand, scale), amax


def _scaled(operand: Tensor, scale: Tensor) -> Tensor:
    return (operand.float() * scale).clamp(-448.0, 448.0).to(FLOAT8)


def _bits(amax: Tensor) -> Tensor:
    return amax.flatten().view(torch.int16).int()


torch.library.impl(BOTH_FORMS, "CUDA", both_forms_by_kernels)
torch.library.impl(COLUMN_FORM, "CUDA", column_form_by_kernel)
torch.library.impl(COLUMN_FORM_WITH_SCALES, "CUDA", column_form_with_scales_by_kernel)
torch.library.impl(BOTH_FORMS, "CPU", both_forms_by_torch)
torch.library.impl(COLUMN_FORM, "CPU", column_form_by_torch)
torch.library.impl(COLUMN_FORM_WITH_SCALES, "CPU", column_form_with_scales_by_torch)
