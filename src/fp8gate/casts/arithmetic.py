"""The formula of torchao's casts in Triton, equal bit for bit, and how rows are loaded and columns stored.

The formula (torchao 0.18.0, float8_utils.py and float8_training_tensor.py):
`scale = float32(1 / max(float64(amax), 1e-12) * 448)` (torch computes number / tensor as a reciprocal and a product),
rounded down to a power of two if asked for, which the rowwise recipe does;
`data = float8_e4m3fn(clamp(float32(x) * scale, -448, 448))`, to the nearest, ties to even. A NaN or an infinity spoils
its whole row or column: the scale is NaN or 0, and infinity * 0 is NaN.

With TRITON_INTERPRET=1 it runs on the CPU; only the conversion instruction is then replaced, by integer arithmetic.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def magnitude_bits(x):
    """The bits of |x|: as integers they have the order of the numbers, with infinity and then NaN above them all."""
    return x.to(tl.int16, bitcast=True) & 0x7FFF


@triton.jit
def scale_of(amax_bits, POWERS_OF_TWO: tl.constexpr):
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

    What exceeds 448 becomes 448, as the clamp before it leaves it.
    """
    bits = x.to(tl.int32, bitcast=True)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448
    sign = (bits >> 24) & 0x80
    as_subnormal = magnitude.to(tl.float32, bitcast=True) + 16384.0  # its last bit is worth 2 ** -9
    subnormal = as_subnormal.to(tl.int32, bitcast=True) - 0x46800000
    normal = (magnitude - (120 << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    value = tl.where(magnitude < (121 << 23), subnormal, normal)
    return tl.where(is_nan, 0x7F, value) | sign


@triton.jit
def float8(x, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        return _rounded_bits(x).to(tl.uint8)
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def word_of(x0, x1, x2, x3, INTERPRETED: tl.constexpr):
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
def load_rows(x_ptr, first_row, step, columns, m, k, COUNT: tl.constexpr):
    """COUNT rows of x, `step` apart; zeros beyond its edges."""
    rows = first_row + tl.arange(0, COUNT) * step
    mask = (rows < m)[:, None] & (columns < k)[None, :]
    return tl.load(x_ptr + rows.to(tl.int64)[:, None] * k + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_transposed(out_ptr, word, first_row, columns, m, k, WORDS: tl.constexpr):
    """Stores words of four rows each: transposing these moves a quarter as many items as transposing bytes."""
    words = first_row // 4 + tl.arange(0, WORDS)
    mask = (columns < k)[:, None] & (words < m // 4)[None, :]
    tl.store(out_ptr + columns.to(tl.int64)[:, None] * (m // 4) + words[None, :], tl.trans(word), mask=mask)


@triton.jit
def store_column_form(x_ptr, out_ptr, scale, first_row, columns, m, k, BLOCK_M: tl.constexpr, INTERPRETED):
    """The column form of a tile, given its scales (1, columns)."""
    x0 = load_rows(x_ptr, first_row, 4, columns, m, k, BLOCK_M // 4).to(tl.float32)
    x1 = load_rows(x_ptr, first_row + 1, 4, columns, m, k, BLOCK_M // 4).to(tl.float32)
    x2 = load_rows(x_ptr, first_row + 2, 4, columns, m, k, BLOCK_M // 4).to(tl.float32)
    x3 = load_rows(x_ptr, first_row + 3, 4, columns, m, k, BLOCK_M // 4).to(tl.float32)
    word = word_of(x0 * scale, x1 * scale, x2 * scale, x3 * scale, INTERPRETED)
    store_transposed(out_ptr, word, first_row, columns, m, k, BLOCK_M // 4)
