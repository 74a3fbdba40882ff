"""A linear in bf16, and torchao's float8 training linears over the same weight.

In: a shape, a device. Out: the operands that all arms share, and arms that run forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training

from fp8gate.filter.contract.recipes import RECIPES, Recipe
from fp8gate.filter.contract.shapes import LinearShape

WEIGHT_STD = 0.02
DATA = f"x, grad ~ N(0, 1); w ~ N(0, {WEIGHT_STD})"
"""Random data as in training: a product of zeros ran 13 % faster than one of random data on an H200."""


def inductor_settings(recipe: Recipe, emulate_precision_casts: bool | None = None) -> dict[str, bool]:
    """Inductor's settings for a recipe: production's, with emulate_precision_casts as asked unless it is None.

    A setting that is off is left out, as that is Inductor's default.
    """
    settings = {**RECIPES[recipe].inductor}
    if emulate_precision_casts is not None:
        settings["emulate_precision_casts"] = emulate_precision_casts
    return {name: value for name, value in settings.items() if value}


@dataclass(frozen=True, slots=True)
class Operands:
    """One set of bf16 tensors for all arms of a point: x (m, k), weight (n, k), grad_output (m, n)."""

    x: Tensor
    weight: nn.Parameter
    grad_output: Tensor

    @classmethod
    def random(cls, shape: LinearShape, device: torch.device) -> Operands:
        x = torch.randn(shape.m, shape.k, device=device, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(shape.n, shape.k, device=device, dtype=torch.bfloat16).normal_(std=WEIGHT_STD)
        grad_output = torch.randn(shape.m, shape.n, device=device, dtype=torch.bfloat16)
        return cls(x, nn.Parameter(weight), grad_output)

    def free(self) -> None:
        """Give the memory back now, although compiled code still refers to the tensors, in reference cycles."""
        for tensor in (self.x, self.weight, self.grad_output):
            tensor.untyped_storage().resize_(0)


@dataclass(frozen=True, slots=True)
class LinearArm:
    """One way to compute the linear; recipe is None for bf16."""

    recipe: Recipe | None
    linear: Callable[[Tensor], Tensor]
    operands: Operands

    def forward(self) -> Tensor:
        """The output, (m, n)."""
        return self.linear(self.operands.x)

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        """The gradients of x and weight. `.backward()` would add accumulation kernels."""
        return torch.autograd.grad(output, (self.operands.x, self.operands.weight), self.operands.grad_output)


def build_linear(recipe: Recipe | None, weight: nn.Parameter) -> nn.Module:
    """A bias-free linear over `weight` (n, k), converted by torchao if there is a recipe."""
    out_features, in_features = weight.shape
    with torch.device("meta"):
        linear = nn.Linear(in_features, out_features, bias=False, dtype=weight.dtype)
    linear.weight = weight
    return linear if recipe is None else convert(linear, recipe)


def convert(module: nn.Module, recipe: Recipe, wanted: Callable[[nn.Module, str], bool] | None = None) -> nn.Module:
    """The module with its linears converted by torchao, or only those that are `wanted`; linears inside it in place."""
    config = Float8LinearConfig.from_recipe_name(recipe)
    converted: nn.Module = convert_to_float8_training(module, module_filter_fn=wanted, config=config)
    return converted
