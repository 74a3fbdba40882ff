"""Settings of training that change what float8 costs and that no table was measured with.

In: torchao's config and how the model runs. Out: a sentence for each such setting. Imports no torchao.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

from fp8gate import casts
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.recipes import RECIPES, Casts, Recipe, Variant

WHAT_CHANGES = {
    "pad_inner_dim": "padding adds copies, and layers that are refused for their size would be converted",
    "force_recompute_fp8_weight_in_bwd": "the weight is cast a second time in the backward pass",
    "enable_fsdp_float8_all_gather": "weights are cast before FSDP gathers them, not in the linear",
    "round_scales_to_power_of_2": "scales are rounded in other kernels",
}


def unmeasured_settings(recipe: Recipe, config: Any, *, compiled: bool) -> Iterator[str]:
    """What differs from the recipe as it was measured. config: torchao's Float8LinearConfig, or None.

    Raises InputError for a config that is none.
    """
    if config is not None and (not dataclasses.is_dataclass(config) or not hasattr(config, "from_recipe_name")):
        raise InputError(f"float8_config: expected torchao's Float8LinearConfig; got {type(config).__name__}")
    if getattr(config, "emulate", False):
        yield "float8_config.emulate is True: float8 is computed in float32, to test, and gains nothing"
        return
    if not compiled:
        yield "compiled=False: what was measured ran under torch.compile, and eager casts cost several times as much"
    if config is None:
        return
    measured = type(config).from_recipe_name(recipe)  # type: ignore[union-attr]  # it has that method
    for one in dataclasses.fields(config):
        asked, usual = getattr(config, one.name), getattr(measured, one.name)
        if asked != usual:
            why = WHAT_CHANGES.get(one.name, f"it is not that of {recipe}")
            yield f"float8_config.{one.name} is {asked}, measured was {usual}: {why}"


def casts_of_environment(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> Casts:
    """Who will compile the recipe's casts in a process with this FP8GATE_CASTS. Turns nothing on, and loads nothing.

    Raises InputError for a value that is not one of the variable's.
    """
    return "fp8gate" if casts.is_asked_for(environment) and "fp8gate" in RECIPES[recipe].casts else "inductor"


def casts_enabled(recipe: Recipe) -> Casts:
    """Who compiles the recipe's casts now. fp8gate's pass leaves recipes alone that it is not for."""
    return "fp8gate" if casts.is_enabled() and "fp8gate" in RECIPES[recipe].casts else "inductor"


def casts_wanted(recipe: Recipe) -> Casts:
    """Who compiles the recipe's casts once the environment is obeyed. Raises InputError as `casts_of_environment`."""
    asked = casts_of_environment(recipe)
    return casts_enabled(recipe) if asked == "inductor" else asked


def wrong_casts(measured: Variant, *, is_default: bool) -> str:
    """What to say where what is measured had other casts than are enabled.

    is_default: nobody asked for these casts; they were enabled when the filter was made.
    """
    if measured.casts == "inductor":
        how = "make the filter after casts.enable()" if is_default else "leave casts to its default"
        return (
            f"fp8gate's casts are on, and what was measured had Inductor's: {how}, to decide by what was measured with "
            "those that are on"
        )
    return (
        "fp8gate's casts are off, and what was measured had them: call fp8gate.casts.enable() before anything is "
        "compiled, or set FP8GATE_CASTS=1"
    )
