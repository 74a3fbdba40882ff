"""The column form of an operand whose scales are known already. 3 bytes move for an element of two.

In: a contiguous bf16 operand (M, K), and its float32 scales (K,). Out: float8 data (K, M).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from fp8gate.casts.arithmetic import INTERPRETED, store_column_form
from fp8gate.casts.operand import checked_shape
from fp8gate.casts.two_passes import TILE_LAUNCH


def scaled_columns(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Raises ValueError for an operand or scales that the kernel does not take."""
    m, k = checked_shape(x)
    if scales.dtype is not torch.float32 or scales.shape != (k,) or not scales.is_contiguous():
        raise ValueError(f"expected {k} contiguous float32 scales; got {scales.dtype} {(*scales.shape,)}")
    data = torch.empty((k, m), dtype=torch.float8_e4m3fn, device=x.device)
    launch = TILE_LAUNCH
    _scaled_kernel[(triton.cdiv(m, launch.rows) * triton.cdiv(k, launch.columns),)](
        x,
        scales,
        data.view(torch.int32),
        m,
        k,
        BLOCK_M=launch.rows,
        BLOCK_K=launch.columns,
        INTERPRETED=INTERPRETED,
        num_warps=launch.warps,
    )
    return data


@triton.jit
def _scaled_kernel(
    x_ptr, scale_ptr, out_ptr, m, k, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, INTERPRETED: tl.constexpr
):
    """The column form of a tile."""
    tiles_across = tl.cdiv(k, BLOCK_K)
    first_row = tl.program_id(0) // tiles_across * BLOCK_M
    columns = tl.program_id(0) % tiles_across * BLOCK_K + tl.arange(0, BLOCK_K)
    scale = tl.load(scale_ptr + columns, mask=columns < k, other=0.0)
    store_column_form(x_ptr, out_ptr, scale[None, :], first_row, columns, m, k, BLOCK_M, INTERPRETED)
