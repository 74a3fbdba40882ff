"""Four ways to cast to the forms of torchao's rowwise recipe by Triton kernels, and the launches of each to try.

fp8gate.casts has the kernels of two of them, and says what the forms are. What each way moves to and from memory for an
element of two bytes:
- `two_pass_forms`: amaxes of rows and columns (2 bytes), then both forms (4 bytes). Column form alone: 2 + 3.
- `panel_column_form`, as fp8gate.casts.panels has it: the column form in one kernel (3 bytes).
- `rows_first_forms`: the row form and the columns' amaxes in one pass (3 bytes), then the column form (3 bytes).
- `strip_column_form`: the column form in one kernel. A program reads a strip of columns twice, the second time mostly
  from the L2 cache (3 to 5 bytes).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fp8gate.casts import panels, two_passes
from fp8gate.casts.arithmetic import INTERPRETED, float8, load_rows, magnitude_bits, scale_of, store_column_form
from fp8gate.casts.operand import Form, Launch, checked_shape, empty_form
from fp8gate.casts.two_passes import amax_bits, cast_tiles

WIDEST_ROW = 16384  # a program of cast_rows holds whole rows in registers


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLaunch:
    """How the kernel of whole rows is launched: elements of its tile at least, rows that a program walks through."""

    elements: int
    walk: int
    warps: int
    stages: int = 1


# The first of each list is the default. All compile for sm_90 without spilling registers.
AMAX_LAUNCHES = (
    two_passes.AMAX_LAUNCH,
    Launch(rows=32, columns=256, walk=128, warps=8),
    Launch(rows=32, columns=256, walk=512, warps=8),
    Launch(rows=32, columns=256, walk=512, warps=8, stages=3),
    Launch(rows=64, columns=128, walk=256, warps=4),
    Launch(rows=64, columns=128, walk=512, warps=8),
)
TILE_LAUNCHES = (
    two_passes.TILE_LAUNCH,
    Launch(rows=128, columns=64, warps=8),
    Launch(rows=128, columns=128, warps=8),
    Launch(rows=256, columns=64, warps=8),
    Launch(rows=128, columns=32, warps=4),
    Launch(rows=256, columns=32, warps=4),
    Launch(rows=64, columns=64, warps=4),
)
STRIP_LAUNCHES = (
    Launch(rows=1024, columns=16, warps=32),
    Launch(rows=2048, columns=16, warps=32),
    Launch(rows=512, columns=32, warps=16),
    Launch(rows=1024, columns=32, warps=32),
    Launch(rows=256, columns=32, warps=8),
    Launch(rows=256, columns=64, warps=16),
)
PANEL_LAUNCHES = (
    panels.PANEL_LAUNCH,
    Launch(rows=128, columns=64, walk=256, warps=4, panel_bytes=4 << 20),
    Launch(rows=128, columns=64, walk=512, warps=8, panel_bytes=8 << 20),
    Launch(rows=256, columns=64, walk=256, warps=8, panel_bytes=8 << 20),
    Launch(rows=128, columns=128, walk=256, warps=8, panel_bytes=8 << 20),
    Launch(rows=128, columns=128, walk=256, warps=8, panel_bytes=12 << 20),
)
ROW_LAUNCHES = (
    RowLaunch(elements=8192, walk=16, warps=8),
    RowLaunch(elements=8192, walk=32, warps=8),
    RowLaunch(elements=8192, walk=32, warps=16),
    RowLaunch(elements=16384, walk=32, warps=16),
    RowLaunch(elements=8192, walk=32, warps=8, stages=3),
)


def two_pass_forms(
    x: torch.Tensor,
    *,
    powers_of_two: bool,
    row_form: bool = True,
    amax_launch: Launch = AMAX_LAUNCHES[0],
    tile_launch: Launch = TILE_LAUNCHES[0],
) -> tuple[Form | None, Form]:
    """Both forms of a bf16 (M, K) operand, or its column form alone: (M, K) with (M, 1), and (K, M) with (1, K)."""
    row_amax, column_amax = amaxes(x, row_form=row_form, launch=amax_launch)
    return cast_tiles(x, row_amax, column_amax, powers_of_two=powers_of_two, launch=tile_launch)


def rows_first_forms(
    x: torch.Tensor,
    *,
    powers_of_two: bool,
    row_launch: RowLaunch = ROW_LAUNCHES[0],
    tile_launch: Launch = TILE_LAUNCHES[0],
) -> tuple[Form, Form]:
    """Both forms of a bf16 (M, K) operand of at most `WIDEST_ROW` columns."""
    row_form, column_amax = cast_rows(x, powers_of_two=powers_of_two, launch=row_launch)
    _, column_form = cast_tiles(x, None, column_amax, powers_of_two=powers_of_two, launch=tile_launch)
    return row_form, column_form


def amaxes(x: torch.Tensor, *, row_form: bool, launch: Launch) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The amaxes of rows (M,), if wanted, and of columns (K,), as `amax_bits` gives them."""
    m, _ = checked_shape(x)
    bits = amax_bits(x, row_form=row_form, launch=launch)
    return bits[:m] if row_form else None, bits[m:]


def cast_rows(x: torch.Tensor, *, powers_of_two: bool, launch: RowLaunch) -> tuple[Form, torch.Tensor]:
    """The row form, and the amaxes of the columns as `amaxes` gives them."""
    m, k = checked_shape(x)
    if k > WIDEST_ROW:
        raise ValueError(f"rows of at most {WIDEST_ROW} columns fit into registers, not {k}: use two_pass_forms")
    block_k = triton.next_power_of_2(k)
    column_amax = torch.zeros(k, dtype=torch.int32, device=x.device)
    form = empty_form((m, k), (m, 1), x)
    _row_kernel[(triton.cdiv(m, launch.walk),)](
        x,
        form.data.view(torch.uint8),
        form.scale,
        column_amax,
        m,
        k,
        POWERS_OF_TWO=powers_of_two,
        BLOCK_M=min(launch.walk, max(1, launch.elements // block_k)),
        BLOCK_K=block_k,
        WALK=launch.walk,
        STAGES=launch.stages,
        INTERPRETED=INTERPRETED,
        num_warps=launch.warps,
    )
    return form, column_amax


def panel_column_form(x: torch.Tensor, *, powers_of_two: bool, launch: Launch = PANEL_LAUNCHES[0]) -> Form:
    """The column form of a bf16 (M, K) operand: data (K, M), scales (1, K)."""
    return panels.column_form_and_amaxes(x, powers_of_two=powers_of_two, launch=launch)[0]


def strip_column_form(x: torch.Tensor, *, powers_of_two: bool, launch: Launch = STRIP_LAUNCHES[0]) -> Form:
    """The column form of a bf16 (M, K) operand: data (K, M), scales (1, K)."""
    m, k = checked_shape(x)
    columns = empty_form((k, m), (1, k), x)
    _strip_kernel[(triton.cdiv(k, launch.columns),)](
        x,
        columns.data.view(torch.int32),
        columns.scale,
        m,
        k,
        POWERS_OF_TWO=powers_of_two,
        BLOCK_M=launch.rows,
        BLOCK_K=launch.columns,
        BLOCKS=triton.cdiv(m, launch.rows),  # a constant: the interpreter of triton 3.6 takes no other bound of a loop
        INTERPRETED=INTERPRETED,
        num_warps=launch.warps,
    )
    return columns


@triton.jit
def _row_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    column_amax_ptr,
    m,
    k,
    POWERS_OF_TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WALK: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The row form of WALK whole rows, and raises the columns' amaxes by theirs."""
    columns = tl.arange(0, BLOCK_K)
    first_row = tl.program_id(0) * WALK
    column_amax = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.int16)
    for step in tl.range(0, WALK, BLOCK_M, num_stages=STAGES):
        x = load_rows(x_ptr, first_row + step, 1, columns, m, k, BLOCK_M)
        magnitude = magnitude_bits(x)
        column_amax = tl.maximum(column_amax, magnitude)
        scale = scale_of(tl.max(magnitude, axis=1), POWERS_OF_TWO)
        rows = first_row + step + tl.arange(0, BLOCK_M)
        tl.store(scale_ptr + rows, scale, mask=rows < m)
        mask = (rows < m)[:, None] & (columns < k)[None, :]
        out = float8(x.to(tl.float32) * scale[:, None], INTERPRETED)
        tl.store(out_ptr + rows.to(tl.int64)[:, None] * k + columns[None, :], out, mask=mask)
    tl.atomic_max(column_amax_ptr + columns, tl.max(column_amax, axis=0), mask=columns < k, sem="relaxed")


@triton.jit
def _strip_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    m,
    k,
    POWERS_OF_TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The column form of BLOCK_K columns: down for the amaxes, then back up, as the last rows read are still cached."""
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    amax = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.int16)
    for block in range(BLOCKS):
        amax = tl.maximum(amax, magnitude_bits(load_rows(x_ptr, block * BLOCK_M, 1, columns, m, k, BLOCK_M)))
    scale = scale_of(tl.max(amax, axis=0), POWERS_OF_TWO)
    tl.store(scale_ptr + columns, scale, mask=columns < k)
    scale = scale[None, :]
    for block in range(BLOCKS):
        first_row = (BLOCKS - 1 - block) * BLOCK_M
        store_column_form(x_ptr, out_ptr, scale, first_row, columns, m, k, BLOCK_M, INTERPRETED)
