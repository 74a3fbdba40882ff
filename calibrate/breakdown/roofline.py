"""The roofline of a linear: the work that its training step cannot do without, and the rates that the device reaches.

In: a recipe and a shape. Out: `Work`, in operations and bytes.
In: a timer and a device. Out: `Ceilings`, from a large square product in bf16, the same in float8, and a large copy.
Each is the best of a few runs, which end before the power limit lowers a GPU's clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torchao.float8.config import CastConfig, Float8LinearConfig, ScalingGranularity, ScalingType

from fp8gate.calibrate.breakdown.breakdown_record import Ceilings, Flop
from fp8gate.calibrate.device.registry import kind_of
from fp8gate.calibrate.device.timer import Timer
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import LinearShape

BF16_BYTES, FLOAT8_BYTES = 2, 1


@dataclass(frozen=True, slots=True)
class Work:
    """What a training step of a linear cannot do without.

    least_cast_bytes: the bytes of reading each operand that is cast once in bf16, and of writing each of its float8
    versions once. Kernels move more if they read an operand again (for its scale, for its other axis) or write a copy.
    """

    forward: Flop
    backward: Flop
    least_cast_bytes: int


def work_of(recipe: Recipe | None, shape: LinearShape) -> Work:
    """Derived from torchao's own configuration of the recipe; None stands for bf16.

    `LinearShape.flop` counts three products of equal size: the output forward, grad_x and grad_weight backward.
    """
    product = shape.flop // 3
    if recipe is None:
        return Work(Flop(product, 0), Flop(2 * product, 0), 0)
    config = Float8LinearConfig.from_recipe_name(recipe)
    x = config.cast_config_input, config.cast_config_input_for_grad_weight
    weight = config.cast_config_weight, config.cast_config_weight_for_grad_input
    grad = config.cast_config_grad_output, config.cast_config_grad_output_for_grad_weight
    output, grad_x, grad_weight = (int(_is_cast(cast)) for cast in (x[0], grad[0], x[1]))
    sizes = (x, shape.m * shape.k), (weight, shape.n * shape.k), (grad, shape.m * shape.n)
    return Work(
        forward=Flop(product * (1 - output), product * output),
        backward=Flop(product * (2 - grad_x - grad_weight), product * (grad_x + grad_weight)),
        least_cast_bytes=sum(elements * _bytes_per_element(casts) for casts, elements in sizes),
    )


def _bytes_per_element(casts: tuple[CastConfig, ...]) -> int:
    """Bytes that one element of an operand is read and written with, given its casts for the two products it is in.

    One float8 version with a scale for the whole tensor serves both products. Scales along an axis need a version for
    each product.
    """
    scaled: list[Any] = [cast.scaling_granularity for cast in casts if _is_cast(cast)]
    versions = 1 if set(scaled) == {ScalingGranularity.TENSORWISE} else len(scaled)
    return (BF16_BYTES if versions else 0) + versions * FLOAT8_BYTES


def _is_cast(cast: CastConfig) -> bool:
    return cast.scaling_type is not ScalingType.DISABLED


def measure_ceilings(timer: Timer[Any], device: torch.device) -> Ceilings:
    """Time the products and the copy, of the sizes that the kind of device has for this."""
    defaults = kind_of(device).defaults
    size = defaults.square
    return Ceilings(
        square=size,
        bf16_tflop_per_s=_product_tflop_per_s("bf16", size, timer, device),
        float8_tflop_per_s=_product_tflop_per_s("float8", size, timer, device),
        copy_gb_per_s=_copy_gb_per_s(defaults.copy_bytes, timer, device),
    )


def _product_tflop_per_s(
    precision: Literal["bf16", "float8"], size: int, timer: Timer[Any], device: torch.device
) -> float:
    """The data are random, because a product of zeros draws less power."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    if precision == "bf16":
        least_us = timer.least_us(lambda: torch.mm(a, b.t()))
    else:
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        scale = torch.ones((), device=device)
        least_us = timer.least_us(
            lambda: torch._scaled_mm(a8, b8.t(), scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True)
        )
    return 2 * size**3 / least_us / 1e6


def _copy_gb_per_s(size_bytes: int, timer: Timer[Any], device: torch.device) -> float:
    """Counts the bytes read and the bytes written."""
    source = torch.zeros(size_bytes, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size_bytes / timer.least_us(lambda: target.copy_(source)) / 1e3
