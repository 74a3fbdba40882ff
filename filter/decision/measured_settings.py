"""Settings of training that change what float8 costs and that no table was measured with.

In: torchao's config and how the model runs. Out: a sentence for each such setting. Imports no torchao.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.recipes import Recipe

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
