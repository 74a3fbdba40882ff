"""The shape a rank multiplies: what tensor parallelism makes of a linear. Pure arithmetic."""

from __future__ import annotations

from fp8gate.filter.models import LinearRole
from fp8gate.filter.shapes import LinearShape


class ShardError(ValueError):
    """A layer that a tensor parallel degree does not divide."""


def local_shape(linear: LinearRole, *, tokens: int, tp: int = 1) -> LinearShape:
    """The (m, k, n) of one rank: `tokens` rows, and out_features (colwise) or in_features (rowwise) over `tp`.

    Raises ShardError if `tp` does not divide that dimension.
    """
    k, n = linear.in_features, linear.out_features
    divided = n if linear.sharding == "colwise" else k
    if divided % tp:
        raise ShardError(
            f"{linear.fqn}: tensor parallel degree {tp} does not divide {divided}, sharded {linear.sharding}"
        )
    return LinearShape(tokens, k, n // tp) if linear.sharding == "colwise" else LinearShape(tokens, k // tp, n)
