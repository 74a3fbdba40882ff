"""What a linear's training step cannot do without: the products' operations, and the bytes its casts must move.

In: a recipe (None for bf16), a shape. Out: a `Work`. From torchao's own configuration of the recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchao.float8.config import CastConfig, Float8LinearConfig, ScalingGranularity, ScalingType

from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import LinearShape

BF16_BYTES, FLOAT8_BYTES = 2, 1


@dataclass(frozen=True, slots=True)
class Flop:
    """Floating-point operations of one direction's products, by the precision of their operands."""

    bf16: int
    float8: int

    @property
    def total(self) -> int:
        return self.bf16 + self.float8


@dataclass(frozen=True, slots=True)
class Work:
    """least_cast_bytes: every operand that is cast is read once in bf16, each float8 version of it written once.

    Kernels move more where they read an operand again (for its scale, for its other axis) or write a copy.
    """

    forward: Flop
    backward: Flop
    least_cast_bytes: int


def work_of(recipe: Recipe | None, shape: LinearShape) -> Work:
    """The products are those of `LinearShape.flop`: one forward, grad_x and grad_weight backward."""
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
    """One version serves both products if its one scale is of the whole tensor; along an axis each has its own."""
    scaled: list[Any] = [cast.scaling_granularity for cast in casts if _is_cast(cast)]
    versions = 1 if set(scaled) == {ScalingGranularity.TENSORWISE} else len(scaled)
    return (BF16_BYTES if versions else 0) + versions * FLOAT8_BYTES


def _is_cast(cast: CastConfig) -> bool:
    return cast.scaling_type is not ScalingType.DISABLED
