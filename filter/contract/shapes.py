"""The shape of one linear layer's training step: what a table is indexed by."""

from __future__ import annotations

from typing import Literal

import msgspec

RowSource = Literal["tokens", "observed", "stated"]
"""What says how many rows a linear multiplies: the tokens of a microbatch, a forward that was observed, or the user."""
FLOAT8_MULTIPLE = 16
"""torch._scaled_mm takes float8 operands only with dimensions that are multiples of 16 (one 16-byte vector)."""
TOKEN_TILE = 128
"""Float8 is slower with tokens that are no multiple of it. Measured were multiples of 16 and of 32 that are none of 64
(LOG.md, 2026-11-26)."""


class LinearShape(msgspec.Struct, frozen=True, order=True):
    """One linear layer as one rank computes it: (m, k) @ (k, n) forward, and two products of that size backward.

    m: tokens, the rows of the input per microbatch. k: in_features. n: out_features. Shapes sort by (m, k, n).
    """

    m: int
    k: int
    n: int

    def __str__(self) -> str:
        return f"({self.m}, {self.k}, {self.n})"

    @property
    def flop(self) -> int:
        """Floating-point operations of forward plus backward: three products of 2 m k n operations each."""
        return 6 * self.m * self.k * self.n

    @property
    def is_aligned(self) -> bool:
        """Whether the tokens are a multiple of TOKEN_TILE."""
        return self.m % TOKEN_TILE == 0

    def indivisible(self) -> str | None:
        """The dimensions that float8 products reject, as people read them ("n = 100"); None if there are none."""
        sizes = (("m", self.m), ("k", self.k), ("n", self.n))
        bad = [f"{name} = {size}" for name, size in sizes if size % FLOAT8_MULTIPLE]
        return ", ".join(bad) or None
