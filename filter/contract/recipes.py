"""The float8 recipes, and everything that differs between them. A new recipe is one more entry here.

The tables, the command line, the report and the tests iterate over `RECIPES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]
"""The names that torchao gives its float8 training recipes (`Float8LinearRecipeName`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeFacts:
    """What fp8gate knows about one recipe.

    accuracy_rank: 1 is the most accurate. The order is that of torchao's documentation: finer scales are more accurate,
    and a weight gradient in bf16 is more accurate still.
    spares_value: of query, key and value projections, the last stays in bf16. With all three in float8, llama3-8b's
    block takes 6.7 % longer than with two, qwen3-8b's 7.8 %, mixtral-8x7b's 2.8 % (plans of an H200).
    inductor: the settings that production compiles this recipe with.
    torchao_skips: takes (in_features, out_features) and says whether torchao's fixed rule leaves such a linear in bf16.
    None if torchao has no rule for the recipe. The numbers are those of `_auto_filter_for_recipe` of torchao 0.18.0; a
    test compares them with that function.
    """

    accuracy_rank: int
    spares_value: bool = False
    inductor: dict[str, bool] = field(default_factory=dict)
    torchao_skips: Callable[[int, int], bool] | None = None


RECIPES: dict[Recipe, RecipeFacts] = {
    "tensorwise": RecipeFacts(
        accuracy_rank=3,
        spares_value=True,
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
