"""Is what was timed right? Output and both gradients of an arm against float32 products of the same operands.

A broken kernel must not count as a fast one. At least 256 rows (all, if there are fewer) and one of every 128 are
compared, over all columns, and every element must be finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8gate.calibrate.linears import Operands
from fp8gate.calibrate.timing import Results

MAX_RELATIVE_ERROR = 0.2
"""Float8 (e4m3) rounding gives about 0.04 and e5m2 about 0.08 on this data; a wrong kernel gives about 1."""

MAX_STRIDE = 128  # a tile of current kernels is at most this high: no tile goes unseen
MIN_ROWS = 256  # of a smaller result, more rows of each tile are compared, up to all of them


def relative_errors(results: Results, operands: Operands) -> dict[str, float]:
    """|result - reference| / |reference| (Frobenius) of output, grad_x and grad_weight; NaN if not finite."""
    x, weight, grad_output = operands.x.detach(), operands.weight.detach(), operands.grad_output
    return {
        "output": _relative_error(results.output, x, weight.t()),
        "grad_x": _relative_error(results.grad_x, grad_output, weight),
        "grad_weight": _relative_error(results.grad_weight, grad_output.t(), x),
    }


def acceptable(errors: dict[str, float]) -> bool:
    """False for NaN too."""
    return all(error <= MAX_RELATIVE_ERROR for error in errors.values())


def _relative_error(result: Tensor, left: Tensor, right: Tensor) -> float:
    """`result` should be left @ right."""
    if not torch.isfinite(result).all():
        return float("nan")
    stride = min(MAX_STRIDE, max(1, result.shape[0] // MIN_ROWS))
    blocks = torch.arange(0, result.shape[0], stride, device=result.device)
    within = torch.randint(stride, blocks.shape, device=result.device)
    rows = (blocks + within).clamp_(max=result.shape[0] - 1)
    reference = left[rows].float() @ right.float()
    return float((result[rows].float() - reference).norm() / reference.norm())
