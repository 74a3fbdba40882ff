"""The float8 recipes, and all that is particular to each. A new recipe is one more entry here.

The tables, the command line, the report and the tests iterate over `RECIPES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]
"""torchao's names of its float8 training recipes (`Float8LinearRecipeName`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeFacts:
    """What fp8gate knows of one recipe.

    accuracy_rank: 1 is the most accurate. torchao's documentation ranks its recipes so: finer scales are more accurate,
    a weight gradient in bf16 more so.
    inductor: the settings that production compiles this recipe with.
    torchao_skips: given (in_features, out_features), whether torchao's fixed rule leaves the linear in bf16; None if
    torchao has no rule for the recipe. Source of the numbers: `_auto_filter_for_recipe` of torchao 0.18.0. A test
    compares them with that function.
    """

    accuracy_rank: int
    inductor: dict[str, bool] = field(default_factory=dict)
    torchao_skips: Callable[[int, int], bool] | None = None


RECIPES: dict[Recipe, RecipeFacts] = {
    "tensorwise": RecipeFacts(
        accuracy_rank=3,
        torchao_skips=lambda k, n: k <= 4096 and n <= 1024,
    ),
    "rowwise": RecipeFacts(
        accuracy_rank=2,
        inductor={"emulate_precision_casts": True},  # torchtitan sets it for this recipe (pytorch issue 150859)
        torchao_skips=lambda k, n: n <= 2048 or k <= 1024 or (n <= 4096 and k <= 2048),
    ),
    "rowwise_with_gw_hp": RecipeFacts(accuracy_rank=1),
}

MOST_ACCURATE_FIRST: tuple[Recipe, ...] = tuple(sorted(RECIPES, key=lambda recipe: RECIPES[recipe].accuracy_rank))
