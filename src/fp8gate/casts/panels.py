"""The column form in one kernel. 3 bytes move for an element of two.

Programs take tasks in order: first the amaxes of a panel of columns that fits into the L2 cache, then its column form,
while the next panel's amaxes are under way.

In: a contiguous bf16 operand (M, K). Out: its column `Form`, and the amaxes of its columns.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from fp8gate.casts.arithmetic import INTERPRETED, load_rows, magnitude_bits, scale_of, store_column_form
from fp8gate.casts.operand import Form, Launch, checked_shape, empty_form

# Of the launches in benchmarks/rowwise_casts_kernels.py, the one that an H100 runs fastest.
PANEL_LAUNCH = Launch(rows=128, columns=64, walk=256, warps=4, panel_bytes=8 << 20)
PANELS_AHEAD = 1  # a panel is cast after this many later panels' amaxes have been given out


def column_form_and_amaxes(
    x: torch.Tensor, *, powers_of_two: bool, launch: Launch = PANEL_LAUNCH
) -> tuple[Form, torch.Tensor]:
    """The column form of a bf16 (M, K) operand, and the amaxes of its columns (K,) as the bits of bf16 numbers."""
    m, k = checked_shape(x)
    columns = empty_form((k, m), (1, k), x)
    panel = max(launch.columns, launch.panel_bytes // (2 * m) // launch.columns * launch.columns)
    panels = triton.cdiv(k, panel)
    across = triton.cdiv(min(panel, k), launch.columns)
    tasks = (triton.cdiv(m, launch.walk) + triton.cdiv(m, launch.rows)) * across
    state = torch.zeros(k + panels + PANELS_AHEAD + 1, dtype=torch.int32, device=x.device)
    _panel_kernel[((panels + PANELS_AHEAD) * tasks,)](
        x,
        columns.data.view(torch.int32),
        columns.scale,
        state,
        state[k:-1],
        state[-1:],
        m,
        k,
        across,
        AHEAD=PANELS_AHEAD,
        POWERS_OF_TWO=powers_of_two,
        BLOCK_M=launch.rows,
        BLOCK_K=launch.columns,
        WALK=launch.walk,
        INTERPRETED=INTERPRETED,
        num_warps=launch.warps,
    )
    return columns, state[:k]


@triton.jit
def _panel_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    column_amax_ptr,
    done_ptr,
    ticket_ptr,
    m,
    k,
    across,
    AHEAD: tl.constexpr,
    POWERS_OF_TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WALK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One task: the amaxes of some columns and rows of a panel, or the column form of a tile, once they are known.

    A ticket says which. Whoever waits, waits for earlier tickets alone, whose programs have begun: no deadlock.
    """
    amax_tasks = tl.cdiv(m, WALK) * across
    tile_tasks = tl.cdiv(m, BLOCK_M) * across
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    panel = ticket // (amax_tasks + tile_tasks)
    task = ticket % (amax_tasks + tile_tasks)
    if task < amax_tasks:
        columns = (panel * across + task % across) * BLOCK_K + tl.arange(0, BLOCK_K)
        first_row = task // across * WALK
        amax = tl.zeros((BLOCK_M // 2, BLOCK_K), dtype=tl.int16)
        if panel * across * BLOCK_K < k:
            for step in range(0, WALK, BLOCK_M // 2):
                x = load_rows(x_ptr, first_row + step, 1, columns, m, k, BLOCK_M // 2)
                amax = tl.maximum(amax, magnitude_bits(x))
            tl.atomic_max(column_amax_ptr + columns, tl.max(amax, axis=0), mask=columns < k, sem="relaxed")
        tl.debug_barrier()  # all threads' amaxes before the count
        tl.atomic_add(done_ptr + panel, 1, sem="release")
    elif panel >= AHEAD:
        panel -= AHEAD
        task -= amax_tasks
        columns = (panel * across + task % across) * BLOCK_K + tl.arange(0, BLOCK_K)
        first_row = task // across * BLOCK_M
        while tl.atomic_add(done_ptr + panel, 0, sem="acquire") < amax_tasks:
            pass
        amax_bits = tl.load(column_amax_ptr + columns, mask=columns < k, other=0, cache_modifier=".cg")
        scale = scale_of(amax_bits, POWERS_OF_TWO)
        if first_row == 0:
            tl.store(scale_ptr + columns, scale, mask=columns < k)
        store_column_form(x_ptr, out_ptr, scale[None, :], first_row, columns, m, k, BLOCK_M, INTERPRETED)
