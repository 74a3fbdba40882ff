"""What a real forward on the CPU does with a model's linears, seen by hooks: what observing without data must find."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map


def rows_of_calls(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
    """Linear -> the rows of its input in each call, for real inputs of these shapes. Without linears never called."""
    rows: dict[str, list[int]] = {}
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear):
            hook = lambda _, args, name=name: rows.setdefault(name, []).append(args[0].numel() // args[0].shape[-1])  # noqa: E731
            linear.register_forward_pre_hook(hook)
    torch.manual_seed(0)
    with torch.no_grad():
        model.train()(**tree_map(_real, dict(inputs)))
    return rows


def _real(value: Any) -> Any:
    """Integers are 0, which is an index into any embedding; other numbers are random."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.randn(value.shape) if value.is_floating_point() else torch.zeros(value.shape, dtype=value.dtype)
