"""Divide a model's layers among tensor parallel ranks: what one rank holds of each, without communication.

In: a model whose parameters hold no data, its parallel plan. Out: the same model with smaller linears and experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp8gate.calibrate.arms.blueprint import BlockError, linears_in
from fp8gate.filter.model.parallel import ShardError, Shards, Style

_DIVIDED_DIM: dict[Style, int] = {"colwise": -2, "rowwise": -1}
"""Of a weight of (out_features, in_features), or of one of several matrices of that shape, as transformers has it."""


def divide_layers(model: nn.Module, shards: Shards, tp: int) -> None:
    """Let every linear and every parameter of experts be a rank's part.

    Raises BlockError for a size that `tp` does not divide, or a parameter that the plan divides in a way not known.
    """
    for name, linear in linears_in(model):
        style = shards.style(name)
        try:
            local = shards.part(style, linear.in_features, linear.out_features)
        except ShardError as error:
            raise BlockError(f"tp: {name}: {error}") from error
        if style == "colwise" and linear.bias is not None:
            linear.bias = _empty(linear.bias, (local.n,))
        linear.weight = _empty(linear.weight, (local.n, local.k))
        linear.in_features, linear.out_features = local.k, local.n
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            _divide_parameters(name, module, shards, tp)


def _divide_parameters(name: str, module: nn.Module, shards: Shards, tp: int) -> None:
    """Parameters that hold several matrices, which a plan names themselves."""
    for own, parameter in module.named_parameters(recurse=False):
        style = shards.style(f"{name}.{own}")
        if style not in _DIVIDED_DIM:
            continue
        shape, dim = list(parameter.shape), _DIVIDED_DIM[style]
        if parameter.ndim != 3 or shape[dim] % tp:
            raise BlockError(f"tp: {name}.{own} of shape {tuple(shape)} cannot be divided by {tp} ({style})")
        shape[dim] //= tp
        setattr(module, own, _empty(parameter, tuple(shape)))


def _empty(like: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device), requires_grad=like.requires_grad)
