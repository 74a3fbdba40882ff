"""Triton kernels for the casts of torchao's rowwise recipe: both float8 forms of a bf16 operand, equal bit for bit.

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

The formula (float8_utils.py, float8_training_tensor.py): `scale = float32(1 / max(float64(amax), 1e-12) * 448)` (torch
computes number / tensor as a reciprocal and a product), rounded down to a power of two if asked for, which the rowwise
recipe does; `data = float8_e4m3fn(clamp(float32(x) * scale, -448, 448))`, to the nearest, ties to even. A NaN or an
infinity spoils its whole row or column: the scale is NaN or 0, and infinity * 0 is NaN.

Four ways to do it, and what each moves to and from memory for an element of two bytes:
- `two_pass_forms`: amaxes of rows and columns (2 bytes), then both forms (4 bytes). Column form alone: 2 + 3.
- `rows_first_forms`: the row form and the columns' amaxes in one pass (3 bytes), then the column form (3 bytes).
- `strip_column_form`: the column form in one kernel. A program reads a strip of columns twice, the second time mostly
  from the L2 cache (3 to 5 bytes).
- `panel_column_form`: the column form in one kernel. Programs take tasks in order: first the amaxes of a panel of
  columns that fits into the L2 cache, then its column form, while the next panel's amaxes are under way (3 bytes).

With TRITON_INTERPRET=1 they run on the CPU; only the conversion instruction is then replaced, by integer arithmetic.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ALIGNMENT = 16  # torch._scaled_mm takes no other sizes, and four rows are stored as one 32-bit word
WIDEST_ROW = 16384  # a program of cast_rows holds whole rows in registers


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


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLaunch:
    """How the kernel of whole rows is launched: elements of its tile at least, rows that a program walks through."""

    elements: int
    walk: int
    warps: int
    stages: int = 1


# The first of each list is the default. All compile for sm_90 without spilling registers.
AMAX_LAUNCHES = (
    Launch(rows=32, columns=256, walk=256, warps=8),
    Launch(rows=32, columns=256, walk=128, warps=8),
    Launch(rows=32, columns=256, walk=512, warps=8),
    Launch(rows=32, columns=256, walk=512, warps=8, stages=3),
    Launch(rows=64, columns=128, walk=256, warps=4),
    Launch(rows=64, columns=128, walk=512, warps=8),
)
TILE_LAUNCHES = (
    Launch(rows=128, columns=64, warps=4),
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
    Launch(rows=128, columns=64, walk=256, warps=4, panel_bytes=8 << 20),
    Launch(rows=128, columns=64, walk=256, warps=4, panel_bytes=4 << 20),
    Launch(rows=128, columns=64, walk=512, warps=8, panel_bytes=8 << 20),
    Launch(rows=256, columns=64, walk=256, warps=8, panel_bytes=8 << 20),
    Launch(rows=128, columns=128, walk=256, warps=8, panel_bytes=8 << 20),
    Launch(rows=128, columns=128, walk=256, warps=8, panel_bytes=12 << 20),
)
PANELS_AHEAD = 1  # a panel is cast after this many later panels' amaxes have been given out
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


def amax_bits(x: torch.Tensor, *, row_form: bool, launch: Launch) -> torch.Tensor:
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


def cast_rows(x: torch.Tensor, *, powers_of_two: bool, launch: RowLaunch) -> tuple[Form, torch.Tensor]:
    """The row form, and the amaxes of the columns as `amaxes` gives them."""
    m, k = checked_shape(x)
    if k > WIDEST_ROW:
        raise ValueError(f"rows of at most {WIDEST_ROW} columns fit into registers, not {k}: use two_pass_forms")
    block_k = triton.next_power_of_2(k)
    column_amax = torch.zeros(k, dtype=torch.int32, device=x.device)
    form = _empty_form((m, k), (m, 1), x)
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


def cast_tiles(
    x: torch.Tensor,
    row_amax: torch.Tensor | None,
    column_amax: torch.Tensor,
    *,
    powers_of_two: bool,
    launch: Launch,
) -> tuple[Form | None, Form]:
    """Both forms given the amaxes, or the column form alone without those of the rows."""
    m, k = checked_shape(x)
    rows = None if row_amax is None else _empty_form((m, k), (m, 1), x)
    columns = _empty_form((k, m), (1, k), x)
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


def strip_column_form(x: torch.Tensor, *, powers_of_two: bool, launch: Launch = STRIP_LAUNCHES[0]) -> Form:
    """The column form of a bf16 (M, K) operand: data (K, M), scales (1, K)."""
    m, k = checked_shape(x)
    columns = _empty_form((k, m), (1, k), x)
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


def panel_column_form(x: torch.Tensor, *, powers_of_two: bool, launch: Launch = PANEL_LAUNCHES[0]) -> Form:
    """The column form of a bf16 (M, K) operand: data (K, M), scales (1, K)."""
    return panel_column_form_and_amaxes(x, powers_of_two=powers_of_two, launch=launch)[0]


def panel_column_form_and_amaxes(
    x: torch.Tensor, *, powers_of_two: bool, launch: Launch = PANEL_LAUNCHES[0]
) -> tuple[Form, torch.Tensor]:
    """The column form of a bf16 (M, K) operand, and the amaxes of its columns (K,) as `amax_bits` gives them."""
    m, k = checked_shape(x)
    columns = _empty_form((k, m), (1, k), x)
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


def checked_shape(x: torch.Tensor) -> tuple[int, int]:
    """(M, K) of an operand that the kernels take; ValueError says what is wrong with any other."""
    if x.dtype is not torch.bfloat16 or x.ndim != 2 or not x.is_contiguous():
        raise ValueError(f"the operand must be a contiguous bf16 matrix, not {x.dtype} {(*x.shape,)} {x.stride()}")
    m, k = x.shape
    if m % ALIGNMENT or k % ALIGNMENT or not x.numel():
        raise ValueError(f"both dimensions must be multiples of {ALIGNMENT} and not 0: {(m, k)}")
    return m, k


def _empty_form(shape: tuple[int, int], scales: tuple[int, int], x: torch.Tensor) -> Form:
    data = torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device)
    return Form(data=data, scale=torch.empty(scales, dtype=torch.float32, device=x.device))


@triton.jit
def _magnitude(x):
    """The bits of |x|: as integers they have the order of the numbers, with infinity and then NaN above them all."""
    return x.to(tl.int16, bitcast=True) & 0x7FFF


@triton.jit
def _scale(amax_bits, POWERS_OF_TWO: tl.constexpr):
    """torchao's scale of an amax, given as the bits of a bf16 number: equal for each of these, as a test shows.

    A float32 division suffices: amax has 8 significant bits, so 448 / amax is no nearer to where rounding changes than
    2 ** -33 of itself.
    448 is 1.75 * 2 ** 8, so the quotient's exponent depends on whether the mantissa of amax exceeds 1.75.
    """
    amax_bits = amax_bits.to(tl.int32)
    if POWERS_OF_TWO:
        clamped = tl.maximum(amax_bits, 0x2B8C)  # the largest bf16 number below 1e-12; both have the scale 2 ** 48
        power = ((262 - ((clamped + 31) >> 7)) << 23).to(tl.float32, bitcast=True)
        scale = tl.where(amax_bits == 0x7F80, 0.0, power)
        return tl.where(amax_bits > 0x7F80, float("nan"), scale)
    amax = (amax_bits << 16).to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.full(amax.shape, 448.0, tl.float32), amax)
    return tl.where(amax_bits <= 0x2B8C, 4.48e14, scale)  # 448 / 1e-12


@triton.jit
def _rounded_bits(x):
    """float8_e4m3fn bits of float32 numbers by integer arithmetic, as c10/util/Float8_e4m3fn.h does it.

    |x| is at most 448 and a rounding error, or NaN: no finite number overflows.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    sign = (bits >> 24) & 0x80
    as_subnormal = magnitude.to(tl.float32, bitcast=True) + 16384.0  # its last bit is worth 2 ** -9
    subnormal = as_subnormal.to(tl.int32, bitcast=True) - 0x46800000
    normal = (magnitude - (120 << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    value = tl.where(magnitude < (121 << 23), subnormal, normal)
    return tl.where(magnitude > 0x7F800000, 0x7F, value) | sign


@triton.jit
def _float8(x, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        return _rounded_bits(x).to(tl.uint8)
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def _word(x0, x1, x2, x3, INTERPRETED: tl.constexpr):
    """Four float32 numbers as four float8_e4m3fn numbers in one 32-bit word, the first in its lowest byte."""
    if INTERPRETED:
        low = _rounded_bits(x0) | (_rounded_bits(x1) << 8)
        return low | (_rounded_bits(x2) << 16) | (_rounded_bits(x3) << 24)
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f",
        [x0, x1, x2, x3],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _load_rows(x_ptr, first_row, step, columns, m, k, COUNT: tl.constexpr):
    """COUNT rows of x, `step` apart; zeros beyond its edges."""
    rows = first_row + tl.arange(0, COUNT) * step
    mask = (rows < m)[:, None] & (columns < k)[None, :]
    return tl.load(x_ptr + rows.to(tl.int64)[:, None] * k + columns[None, :], mask=mask, other=0.0)


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
        magnitude = _magnitude(_load_rows(x_ptr, first_row + step, 1, columns, m, k, BLOCK_M))
        column_amax = tl.maximum(column_amax, magnitude)
        if ROWS:
            rows = first_row + step + tl.arange(0, BLOCK_M)
            tl.atomic_max(row_amax_ptr + rows, tl.max(magnitude, axis=1), mask=rows < m, sem="relaxed")
    tl.atomic_max(column_amax_ptr + columns, tl.max(column_amax, axis=0), mask=columns < k, sem="relaxed")


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
        x = _load_rows(x_ptr, first_row + step, 1, columns, m, k, BLOCK_M)
        magnitude = _magnitude(x)
        column_amax = tl.maximum(column_amax, magnitude)
        scale = _scale(tl.max(magnitude, axis=1), POWERS_OF_TWO)
        rows = first_row + step + tl.arange(0, BLOCK_M)
        tl.store(scale_ptr + rows, scale, mask=rows < m)
        mask = (rows < m)[:, None] & (columns < k)[None, :]
        out = _float8(x.to(tl.float32) * scale[:, None], INTERPRETED)
        tl.store(out_ptr + rows.to(tl.int64)[:, None] * k + columns[None, :], out, mask=mask)
    tl.atomic_max(column_amax_ptr + columns, tl.max(column_amax, axis=0), mask=columns < k, sem="relaxed")


@triton.jit
def _store_transposed(out_ptr, word, first_row, columns, m, k, WORDS: tl.constexpr):
    """Stores words of four rows each: transposing these moves a quarter as many items as transposing bytes."""
    words = first_row // 4 + tl.arange(0, WORDS)
    mask = (columns < k)[:, None] & (words < m // 4)[None, :]
    tl.store(out_ptr + columns.to(tl.int64)[:, None] * (m // 4) + words[None, :], tl.trans(word), mask=mask)


@triton.jit
def _store_row_form(x, amax_ptr, out_ptr, scale_ptr, first_row, columns, m, k, POWERS_OF_TWO, COUNT, INTERPRETED):
    """Stores every fourth row from the first on, and their scales, given their amaxes."""
    rows = first_row + tl.arange(0, COUNT) * 4
    scale = _scale(tl.load(amax_ptr + rows, mask=rows < m, other=0), POWERS_OF_TWO)
    out = _float8(x * scale[:, None], INTERPRETED)
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
    x0 = _load_rows(x_ptr, first_row, 4, columns, m, k, BLOCK_M // 4).to(tl.float32)
    x1 = _load_rows(x_ptr, first_row + 1, 4, columns, m, k, BLOCK_M // 4).to(tl.float32)
    x2 = _load_rows(x_ptr, first_row + 2, 4, columns, m, k, BLOCK_M // 4).to(tl.float32)
    x3 = _load_rows(x_ptr, first_row + 3, 4, columns, m, k, BLOCK_M // 4).to(tl.float32)
    scale = _scale(tl.load(column_amax_ptr + columns, mask=columns < k, other=0), POWERS_OF_TWO)
    if first_row == 0:
        tl.store(column_scale_ptr + columns, scale, mask=columns < k)
    scale = scale[None, :]
    word = _word(x0 * scale, x1 * scale, x2 * scale, x3 * scale, INTERPRETED)
    _store_transposed(column_out_ptr, word, first_row, columns, m, k, BLOCK_M // 4)
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
        amax = tl.maximum(amax, _magnitude(_load_rows(x_ptr, block * BLOCK_M, 1, columns, m, k, BLOCK_M)))
    scale = _scale(tl.max(amax, axis=0), POWERS_OF_TWO)
    tl.store(scale_ptr + columns, scale, mask=columns < k)
    scale = scale[None, :]
    for block in range(BLOCKS):
        first_row = (BLOCKS - 1 - block) * BLOCK_M
        _store_column_form(x_ptr, out_ptr, scale, first_row, columns, m, k, BLOCK_M, INTERPRETED)


@triton.jit
def _store_column_form(x_ptr, out_ptr, scale, first_row, columns, m, k, BLOCK_M: tl.constexpr, INTERPRETED):
    """The column form of a tile, given its scales (1, columns)."""
    x0 = _load_rows(x_ptr, first_row, 4, columns, m, k, BLOCK_M // 4).to(tl.float32)
    x1 = _load_rows(x_ptr, first_row + 1, 4, columns, m, k, BLOCK_M // 4).to(tl.float32)
    x2 = _load_rows(x_ptr, first_row + 2, 4, columns, m, k, BLOCK_M // 4).to(tl.float32)
    x3 = _load_rows(x_ptr, first_row + 3, 4, columns, m, k, BLOCK_M // 4).to(tl.float32)
    word = _word(x0 * scale, x1 * scale, x2 * scale, x3 * scale, INTERPRETED)
    _store_transposed(out_ptr, word, first_row, columns, m, k, BLOCK_M // 4)


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
                x = _load_rows(x_ptr, first_row + step, 1, columns, m, k, BLOCK_M // 2)
                amax = tl.maximum(amax, _magnitude(x))
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
        scale = _scale(amax_bits, POWERS_OF_TWO)
        if first_row == 0:
            tl.store(scale_ptr + columns, scale, mask=columns < k)
        _store_column_form(x_ptr, out_ptr, scale[None, :], first_row, columns, m, k, BLOCK_M, INTERPRETED)
