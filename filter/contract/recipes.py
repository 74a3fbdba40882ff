"""The float8 recipes, and everything that differs between them. A new recipe is one more entry here.

The tables, the command line, the report and the tests iterate over `RECIPES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from fp8gate.filter.contract.errors import InputError

Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]
"""The names that torchao gives its float8 training recipes (`Float8LinearRecipeName`)."""
Casts = Literal["inductor", "fp8gate"]
"""Who compiles the casts to float8: Inductor, as it does by default, or the pass of `fp8gate.casts`, where it is on."""


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
    casts: who can compile its casts. fp8gate's pass leaves a recipe alone that casts no operand along its columns, or
    with one scale for all.
    """

    accuracy_rank: int
    spares_value: bool = False
    inductor: dict[str, bool] = field(default_factory=dict)
    torchao_skips: Callable[[int, int], bool] | None = None
    casts: tuple[Casts, ...] = ("inductor",)


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
        casts=get_args(Casts),
    ),
    "rowwise_with_gw_hp": RecipeFacts(accuracy_rank=1),
}

MOST_ACCURATE_FIRST: tuple[Recipe, ...] = tuple(sorted(RECIPES, key=lambda recipe: RECIPES[recipe].accuracy_rank))


class Variant(NamedTuple):
    """What one table is of: a recipe, and who compiles its casts."""

    recipe: Recipe
    casts: Casts = "inductor"

    def __str__(self) -> str:
        """ "rowwise", or "rowwise, fp8gate's casts"."""
        return self.recipe if self.casts == "inductor" else f"{self.recipe}, {self.casts}'s casts"

    @property
    def suffix(self) -> str:
        """What the names of its files end with: "-fp8gate_casts", or nothing."""
        return "" if self.casts == "inductor" else f"-{self.casts}_casts"

    @property
    def name(self) -> str:
        """Of its table, without ".yaml"."""
        return f"{self.recipe}{self.suffix}"

    @property
    def file(self) -> str:
        """Of its table, in a device's folder."""
        return f"{self.name}.yaml"

    @property
    def with_casts(self) -> str:
        """What a sentence about something measured adds: " with fp8gate's casts", or nothing."""
        return "" if self.casts == "inductor" else f" with {self.casts}'s casts"

    @property
    def option(self) -> str:
        """What a command of fp8gate needs to be about it, beside the recipe."""
        return "" if self.casts == "inductor" else f" --casts {self.casts}"


VARIANTS = tuple(Variant(recipe, casts) for recipe, facts in RECIPES.items() for casts in facts.casts)
"""Every table that a device can have, in the order of the recipes."""


def recipes_with(casts: Casts) -> tuple[Recipe, ...]:
    """The recipes whose casts these can be."""
    return tuple(recipe for recipe, facts in RECIPES.items() if casts in facts.casts)


def require_casts(recipe: Recipe, casts: Casts) -> None:
    """Raises InputError for casts that are none, or that this recipe cannot have."""
    if casts not in RECIPES[recipe].casts:
        of = f" ({', '.join(recipes_with(casts))} can have those)" if casts in get_args(Casts) else ""
        raise InputError(f"casts: expected {' or '.join(RECIPES[recipe].casts)} for {recipe}; got {casts!r}{of}")


def other_casts(found: Variant) -> str:
    """What a caller in Python does about a table or plan of other casts than were asked for."""
    if found.casts == "inductor":
        return "it was measured with Inductor's casts; give casts='inductor', and leave those of fp8gate off"
    return (
        f"it was measured with {found.casts}'s casts; to train with them: fp8gate.casts.enable(), before anything is "
        "compiled, or FP8GATE_CASTS=1"
    )


def other_casts_option(found: Variant) -> str:
    """The same for someone at the command line."""
    if found.casts == "inductor":
        return "it was measured with Inductor's casts; leave out --casts (where FP8GATE_CASTS is 1: --casts inductor)"
    return f"it was measured with {found.casts}'s casts; add{found.option}"


SEE_BOTH_CASTS = (
    "fp8gate report FOLDER draws both, and fp8gate explain MODEL ... --casts fp8gate asks the one with fp8gate's casts"
)
"""What is possible with two tables of one recipe and different casts, which cannot be merged or compared."""


def casts_json(variant: Variant) -> dict[str, str]:
    """What the JSON of a command has beside the recipe: the casts, if they are not Inductor's."""
    return {} if variant.casts == "inductor" else {"casts": variant.casts}
