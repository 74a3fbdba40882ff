"""Both forms in two passes: the amaxes of rows and columns, then the data. 2 + 4 bytes move for an element of two.

In: a contiguous bf16 operand (M, K), for the second pass with its amaxes. Out: amaxes, as the bits of bf16 numbers; the
`Form`s. The column form alone moves 2 + 3 bytes, and `fp8gate.casts.panels` fewer.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from fp8gate.casts.arithmetic import (
    INTERPRETED,
    float8,
    load_rows,
    magnitude_bits,
    scale_of,
    store_transposed,
    word_of,
)
from fp8gate.casts.operand import Form, Launch, checked_shape, empty_form

# Of the launches in benchmarks/rowwise_casts_kernels.py, those that an H100 runs fastest.
AMAX_LAUNCH = Launch(rows=32, columns=256, walk=256, warps=8)
TILE_LAUNCH = Launch(rows=128, columns=64, warps=4)


def amax_bits(x: torch.Tensor, *, row_form: bool, launch: Launch = AMAX_LAUNCH) -> torch.Tensor:
    """The amaxes of rows, zeros if not wanted, then those of columns (M + K,): the bits of bf16 numbers, as int32."""
    m, k = checked_shape(x)
    bits = torch.zeros(m + k, dtype=torch.int32, device=x.device)
    _amax_kernel[(triton.cdiv(k, launch.columns), triton.cdiv(m, launch.walk))](
        x,
        bits[:m],
        bits[m:],
        m,
        k,
        ROWS=row_form,
        BLOCK_M=launch.rows,
        BLOCK_K=launch.columns,
        WALK=launch.walk,
        STAGES=launch.stages,
        num_warps=launch.warps,
    )
    return bits


def cast_tiles(
    x: torch.Tensor,
    row_amax: torch.Tensor | None,
    column_amax: torch.Tensor,
    *,
    powers_of_two: bool,
    launch: Launch = TILE_LAUNCH,
) -> tuple[Form | None, Form]:
    """Both forms given the amaxes, or the column form alone without those of the rows."""
    m, k = checked_shape(x)
    rows = None if row_amax is None else empty_form((m, k), (m, 1), x)
    columns = empty_form((k, m), (1, k), x)
    unused = columns  # stands for the row form where there is none
    _tile_kernel[(triton.cdiv(m, launch.rows) * triton.cdiv(k, launch.columns),)](
        x,
        column_amax if row_amax is None else row_amax,
        column_amax,
        (rows or unused).data.view(torch.uint8),
        (rows or unused).scale,
        columns.data.view(torch.int32),
        columns.scale,
        m,
        k,
        ROWS=rows is not None,
        POWERS_OF_TWO=powers_of_two,
        BLOCK_M=launch.rows,
        BLOCK_K=launch.columns,
        INTERPRETED=INTERPRETED,
        num_warps=launch.warps,
    )
    return rows, columns


@triton.jit
def _amax_kernel(
    x_ptr,
    row_amax_ptr,
    column_amax_ptr,
    m,
    k,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WALK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Raises the amaxes of rows and columns, as bits, by those of WALK rows and BLOCK_K columns."""
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    first_row = tl.program_id(1) * WALK
    column_amax = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.int16)
    for step in tl.range(0, WALK, BLOCK_M, num_stages=STAGES):
        magnitude = magnitude_bits(load_rows(x_ptr, first_row + step, 1, columns, m, k, BLOCK_M))
        column_amax = tl.maximum(column_amax, magnitude)
        if ROWS:
            rows = first_row + step + tl.arange(0, BLOCK_M)
            tl.atomic_max(row_amax_ptr + rows, tl.max(magnitude, axis=1), mask=rows < m, sem="relaxed")
    tl.atomic_max(column_amax_ptr + columns, tl.max(column_amax, axis=0), mask=columns < k, sem="relaxed")


@triton.jit
def _store_row_form(x, amax_ptr, out_ptr, scale_ptr, first_row, columns, m, k, POWERS_OF_TWO, COUNT, INTERPRETED):
    """Stores every fourth row from the first on, and their scales, given their amaxes."""
    rows = first_row + tl.arange(0, COUNT) * 4
    scale = scale_of(tl.load(amax_ptr + rows, mask=rows < m, other=0), POWERS_OF_TWO)
    out = float8(x * scale[:, None], INTERPRETED)
    mask = (rows < m)[:, None] & (columns < k)[None, :]
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * k + columns[None, :], out, mask=mask)
    tl.store(scale_ptr + rows, scale, mask=rows < m)


@triton.jit
def _tile_kernel(
    x_ptr,
    row_amax_ptr,
    column_amax_ptr,
    row_out_ptr,
    row_scale_ptr,
    column_out_ptr,
    column_scale_ptr,
    m,
    k,
    ROWS: tl.constexpr,
    POWERS_OF_TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Both forms of a tile, or its column form, given the amaxes."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # what was read last before is still in the L2 cache
    tiles_across = tl.cdiv(k, BLOCK_K)
    first_row = tile // tiles_across * BLOCK_M
    columns = tile % tiles_across * BLOCK_K + tl.arange(0, BLOCK_K)
    x0 = load_rows(x_ptr, first_row, 4, columns, m, k, BLOCK_M // 4).to(tl.float32)
    x1 = load_rows(x_ptr, first_row + 1, 4, columns, m, k, BLOCK_M // 4).to(tl.float32)
    x2 = load_rows(x_ptr, first_row + 2, 4, columns, m, k, BLOCK_M // 4).to(tl.float32)
    x3 = load_rows(x_ptr, first_row + 3, 4, columns, m, k, BLOCK_M // 4).to(tl.float32)
    scale = scale_of(tl.load(column_amax_ptr + columns, mask=columns < k, other=0), POWERS_OF_TWO)
    if first_row == 0:
        tl.store(column_scale_ptr + columns, scale, mask=columns < k)
    scale = scale[None, :]
    word = word_of(x0 * scale, x1 * scale, x2 * scale, x3 * scale, INTERPRETED)
    store_transposed(column_out_ptr, word, first_row, columns, m, k, BLOCK_M // 4)
    if ROWS:
        count: tl.constexpr = BLOCK_M // 4
        for i in tl.static_range(4):
            x = x0 if i == 0 else (x1 if i == 1 else (x2 if i == 2 else x3))
            _store_row_form(
                x,
                row_amax_ptr,
                row_out_ptr,
                row_scale_ptr,
                first_row + i,
                columns,
                m,
                k,
                POWERS_OF_TWO,
                count,
                INTERPRETED,
            )
