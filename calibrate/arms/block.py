"""A block of layers on a device: its random tensors, the arms that compute with them, and what they give in bf16.

In: a `Blueprint`. Out: arms that a timer runs, and how far each is from bf16. Parameters, and inputs that require a
gradient, are random, wherever the block comes from: only time counts.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fp8gate.calibrate.arms.blueprint import BlockError, Blueprint, ReadyBlock, empty, named_leaves
from fp8gate.calibrate.arms.compilation import put_tensors
from fp8gate.calibrate.arms.linear import WEIGHT_STD
from fp8gate.calibrate.device.registry import kind_of
from fp8gate.calibrate.device.timer import Results

DATA = f"input, grad ~ N(0, 1); weights ~ N(0, {WEIGHT_STD}), of norms 1, biases 0"
PIECE = 2**24  # elements
TRUSTED = 0.05  # skip results that bf16 reproduces no better than this: they are rounding noise
INPUT_NOISE = 0.03  # of an input's values, about what rounding it to float8 (e4m3) changes
MAX_MOVED = 0.2
"""Skip results that such noise at the input moves by more: a router then sends tokens to other experts, so that its
gradient and theirs differ whatever computes them. Results without a router move by 0.02 to 0.08."""


class Block:
    """A block's random tensors on a device, and what they give in bf16."""

    def __init__(self, blueprint: Blueprint, device: torch.device) -> None:
        template = blueprint.template
        self.tensors: dict[str, Tensor] = {
            **{name: _random_parameter(name, one, device) for name, one in template.named_parameters()},
            **{name: buffer.to(device) for name, buffer in blueprint.buffers.items()},
        }
        self.inputs = tree_map_only(Tensor, lambda tensor: _real(tensor, device), blueprint.inputs)
        inputs = [(name, leaf) for name, leaf in named_leaves(self.inputs) if leaf.requires_grad]
        self._data = [(leaf, leaf.detach().clone(), _alike(leaf)) for _, leaf in inputs]
        leaves = dict((*inputs, *((name, one) for name, one in self.tensors.items() if one.requires_grad)))
        self._names, self._wanted = ("output", *leaves), tuple(leaves.values())
        self._grad_output = torch.empty(0)
        eager = self.arm(blueprint.ready(frozenset(), None, None, device.type))
        output = eager.forward()
        self._grad_output = torch.randn_like(output)
        self._require_all_used(output)
        with self._check_data():
            self._expected = self._reference(eager, 1.0)
            noise = self._errors(self._reference(eager, 3.0))
            self._disturb_inputs()
            moved = self._errors(self._reference(eager, 1.0))
        self._is_compared = [a <= TRUSTED and b <= MAX_MOVED for a, b in zip(noise, moved, strict=True)]
        for name, right in zip(self._names, self._expected, strict=True):
            if not torch.isfinite(right).all():
                raise BlockError(f"{name}: expected finite values in bf16, with random weights and inputs")
        del eager, output
        gc.collect()
        kind_of(device).release_memory(device)  # of what only this took

    def arm(self, ready: ReadyBlock) -> BlockArm:
        """The arm that computes with these tensors."""
        put_tensors(ready.module, self.tensors)
        return BlockArm(ready.function, self.inputs, self._wanted, self._grad_output)

    def error(self, run: Callable[[], Results]) -> tuple[float, str]:
        """The largest |result - bf16's| / |bf16's| (Frobenius) of all that `run` gives, and whose it is; NaN if not
        finite.

        Of the output, what the block adds to its input counts. In this run, rows share half their variance: with
        independent rows attention averages to nearly zero, and a relative error means nothing.
        """
        with self._check_data():
            results = run()
            found = (self._added(results.output), *results.gradients)
        compared = zip(self._errors(found), self._names, self._is_compared, strict=True)
        errors = [(error, name) for error, name, is_compared in compared if is_compared]
        return max(errors, key=lambda error: math.inf if math.isnan(error[0]) else error[0])

    @contextlib.contextmanager
    def _check_data(self) -> Iterator[None]:
        """Let the inputs have rows that are alike, in the memory of the inputs that are timed."""
        with torch.no_grad():
            for leaf, _, alike in self._data:
                leaf.copy_(alike)
        try:
            yield
        finally:
            with torch.no_grad():
                for leaf, timed, _ in self._data:
                    leaf.copy_(timed)

    def _errors(self, found: Sequence[Tensor]) -> list[float]:
        """How far each result is from bf16's."""
        return [_relative_error(one, right) for one, right in zip(found, self._expected, strict=True)]

    def _disturb_inputs(self) -> None:
        with torch.no_grad():
            for leaf, _, _ in self._data:
                leaf.mul_(1 + INPUT_NOISE * torch.randn_like(leaf))

    def _reference(self, eager: BlockArm, scale: float) -> tuple[Tensor, ...]:
        """The results in bf16. scale: multiplies the gradients on the way, which changes only how they are rounded."""
        output = eager.forward()
        gradients = replace(eager, grad_output=scale * self._grad_output).backward(output)
        return (self._added(output.detach()), *(gradient / scale for gradient in gradients))

    def _added(self, output: Tensor) -> Tensor:
        """The output without the input of its shape that a residual connection has added."""
        return next((output - leaf.detach() for leaf in self._wanted if leaf.shape == output.shape), output)

    def _require_all_used(self, output: Tensor) -> None:
        gradients = torch.autograd.grad(output, self._wanted, self._grad_output, allow_unused=True)
        for name, gradient in zip(self._names[1:], gradients, strict=True):
            if gradient is None:
                raise BlockError(f"{name}: expected the output to depend on it, as it requires a gradient")


@dataclass(frozen=True, slots=True)
class BlockArm:
    """One way to compute a block. wanted: the inputs and parameters whose gradients training needs."""

    function: Callable[..., Any]
    inputs: Mapping[str, Any]
    wanted: tuple[Tensor, ...]
    grad_output: Tensor

    def forward(self) -> Tensor:
        return _tensor(self.function(**self.inputs))

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        """Not `.backward()`, which would add accumulation kernels."""
        return torch.autograd.grad(output, self.wanted, self.grad_output)


def _random_parameter(name: str, like: Tensor, device: torch.device) -> nn.Parameter:
    parameter = nn.Parameter(empty(like, device), requires_grad=like.requires_grad)
    with torch.no_grad():
        if parameter.ndim > 1:
            parameter.normal_(std=WEIGHT_STD)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return parameter


def _real(tensor: Tensor, device: torch.device) -> Tensor:
    """Random data for an input that requires a gradient; another input is copied."""
    if not tensor.is_meta:
        return tensor.to(device)
    return empty(tensor, device).normal_().requires_grad_()


def _alike(leaf: Tensor) -> Tensor:
    """Of variance 1, half of which all rows share."""
    own, common = torch.randn_like(leaf), torch.randn(leaf.shape[-1:], dtype=leaf.dtype, device=leaf.device)
    return (own.detach() + common) / math.sqrt(2)


def _relative_error(result: Tensor, right: Tensor) -> float:
    """|result - right| / |right| (Frobenius), NaN if not finite.

    Compares a piece at a time: experts' gradients are gigabytes, and twice that in float32.
    """
    pieces = zip(torch.split(result.flatten(), PIECE), torch.split(right.flatten(), PIECE), strict=True)
    squares = torch.zeros(2, dtype=torch.float64, device=result.device)
    for one, other in pieces:
        other = other.float()
        squares += torch.stack([(one.float() - other).square().sum(), other.square().sum()])
    error, size = squares.sqrt()
    return float(error / size) if torch.isfinite(error) else math.nan


def _tensor(output: Any) -> Tensor:
    """What a block returns, or the first of several results. Raises BlockError if that is no tensor."""
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor):
        raise BlockError(
            f"block: expected a tensor, or a tuple that begins with one; it returns {type(first).__name__}"
        )
    return first
