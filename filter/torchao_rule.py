"""torchao's fixed rule, restated to say what it would do where torchao is not installed.

Source of the numbers: `_auto_filter_for_recipe` of torchao 0.18.0; a test holds this against the real function.
"""

from __future__ import annotations

from fp8gate.filter.shapes import FLOAT8_MULTIPLE
from fp8gate.filter.table import Recipe


def torchao_converts(recipe: Recipe, *, in_features: int, out_features: int) -> bool | None:
    """Whether torchao's rule converts a linear of this size, or None for a recipe it has no rule for."""
    k, n = in_features, out_features
    small = {
        "tensorwise": k <= 4096 and n <= 1024,
        "rowwise": n <= 2048 or k <= 1024 or (n <= 4096 and k <= 2048),
    }
    if recipe not in small:
        return None
    return not (small[recipe] or k % FLOAT8_MULTIPLE or n % FLOAT8_MULTIPLE)
