"""What the kernels take and give: a bf16 operand, its float8 forms, and how a kernel is launched.

Which forms the products read (torchao 0.18.0, float8_linear.py and preprocess_addmm in float8_ops.py); tokens M,
input features K, output features N, every operand stored row-major in bf16:

| product                               | first operand                          | second operand                   |
|---------------------------------------|----------------------------------------|----------------------------------|
| output = input @ weight.t()           | input (M, K), row form                 | weight (N, K), row form          |
| grad_input = grad_output @ weight     | grad_output (M, N), row form           | weight (N, K), column form       |
| grad_weight = grad_output.t() @ input | grad_output (M, N), column form        | input (M, K), column form        |

Row form: one scale for each row, data stored as the operand is. Column form: one scale for each column, data stored
transposed, because `torch._scaled_mm` wants its first operand row-major and its second column-major: preprocess_addmm
copies with `.contiguous()` or `.t().contiguous().t()` where they are not. So each operand of a linear is read in both
forms; grad_output needs both at once, input and weight one in the forward and the other in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ALIGNMENT = 16  # torch._scaled_mm takes no other sizes, and four rows are stored as one 32-bit word


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """A float8 operand, and the float32 scales that it was multiplied by."""

    data: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """How a kernel is launched: rows and columns of its tile, and how many rows a program walks through."""

    rows: int
    columns: int
    warps: int
    walk: int = 0
    stages: int = 1  # above 1, so many loads are under way ahead of their use
    panel_bytes: int = 0  # of the operand in a panel, about


def checked_shape(x: torch.Tensor) -> tuple[int, int]:
    """(M, K) of an operand that the kernels take; ValueError says what is wrong with any other."""
    if x.dtype is not torch.bfloat16 or x.ndim != 2 or not x.is_contiguous():
        raise ValueError(f"the operand must be a contiguous bf16 matrix, not {x.dtype} {(*x.shape,)} {x.stride()}")
    m, k = x.shape
    if m % ALIGNMENT or k % ALIGNMENT or not x.numel():
        raise ValueError(f"both dimensions must be multiples of {ALIGNMENT} and not 0: {(m, k)}")
    return m, k


def empty_form(shape: tuple[int, int], scales: tuple[int, int], x: torch.Tensor) -> Form:
    data = torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device)
    return Form(data=data, scale=torch.empty(scales, dtype=torch.float32, device=x.device))
