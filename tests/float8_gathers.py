"""A run of a script that counts the weights which torchao casts to float8 before FSDP gathers them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forked import run_script
from torchao.float8 import fsdp_utils


def count_float8_gathers(script: Path, *arguments: object) -> None:
    """Run the script, and say how often a weight was cast before it was gathered, and how often the scale was known."""
    weight_type = fsdp_utils.WeightWithDynamicFloat8CastTensor
    gather, scales = weight_type.fsdp_pre_all_gather, []

    def count_and_gather(weight: Any, mesh: Any) -> Any:
        scales.append(weight._precomputed_scale)
        return gather(weight, mesh)

    weight_type.fsdp_pre_all_gather = count_and_gather
    run_script(script, *arguments)
    print(f"{len(scales)} casts before gathering, {sum(scale is not None for scale in scales)} by a known scale")
