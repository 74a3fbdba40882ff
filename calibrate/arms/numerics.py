"""Check what was timed: output and both gradients of a linear against float32 products of the same operands.

A broken kernel must not count as a fast one. At least 256 rows (all, if there are fewer) and one of every 128 are
compared over all columns, and every element must be finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8gate.calibrate.arms.linear import Operands
from fp8gate.calibrate.device.timer import Results

MAX_RELATIVE_ERROR = 0.2
"""Float8 (e4m3) rounding gives about 0.04 and e5m2 about 0.08 on this data; a wrong kernel gives about 1."""

MAX_STRIDE = 128  # tiles of current kernels are at most this high, so every tile is looked at
MIN_ROWS = 256  # of a smaller result, more rows of each tile are compared


class References:
    """What the arms of a point should compute, in float32, at some rows that stand for all."""

    def __init__(self, operands: Operands) -> None:
        x, weight, grad_output = operands.x.detach(), operands.weight.detach(), operands.grad_output
        self._output = _Reference(x, weight.t())
        self._grad_x = _Reference(grad_output, weight)
        self._grad_weight = _Reference(grad_output.t(), x)

    def relative_errors(self, results: Results) -> dict[str, float]:
        """|result - reference| / |reference| (Frobenius) of output, grad_x and grad_weight; NaN if not finite."""
        return {
            "output": self._output.relative_error(results.output),
            "grad_x": self._grad_x.relative_error(results.grad_x),
            "grad_weight": self._grad_weight.relative_error(results.grad_weight),
        }


def acceptable(errors: dict[str, float]) -> bool:
    """False for NaN too."""
    return all(error <= MAX_RELATIVE_ERROR for error in errors.values())


class _Reference:
    """Some rows of left @ right."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        height = left.shape[0]
        stride = min(MAX_STRIDE, max(1, height // MIN_ROWS))
        blocks = torch.arange(0, height, stride, device=left.device)
        within = torch.randint(stride, blocks.shape, device=left.device)
        self.rows = (blocks + within).clamp_(max=height - 1)
        self.expected = left[self.rows].float() @ right.float()

    def relative_error(self, result: Tensor) -> float:
        if not torch.isfinite(result).all():
            return float("nan")
        return float((result[self.rows].float() - self.expected).norm() / self.expected.norm())
