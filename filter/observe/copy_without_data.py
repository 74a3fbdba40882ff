"""Copy a model without its data: the same modules, whose tensors have shapes and nothing else.

In: a model, a FakeTensorMode. Out: a copy that can run its forward inside that mode.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any

from fp8gate.filter.model.observed import ObserveError
from fp8gate.filter.model.plain_linear import HOOKS

if TYPE_CHECKING:
    from torch import Tensor, nn


FAKE_TENSORS = ("torch._subclasses.fake_tensor", logging.CRITICAL)
"""torch logs the traceback of an operation that fails without data, beside raising it."""


def copy_without_data(model: nn.Module, mode: Any, dtype_of: Callable[[Tensor, bool], Any]) -> nn.Module:
    """A copy in which every parameter, buffer and tensor of a module is a fake one of the same shape and device.

    It has no hooks: they may print, count or communicate, and belong to objects that are not the model's.
    """
    memo: dict[int, Any] = {}
    with mode:
        for tensor in _tensors_of(model):
            memo[id(tensor)] = _fake_of(tensor, dtype_of)
    for name, module in model.named_modules():
        _require_no_closure(name, module)
        for kind in HOOKS:
            memo[id(getattr(module, kind))] = OrderedDict()
    try:
        with mode, quiet(*FAKE_TENSORS):
            return copy.deepcopy(model, memo)
    except Exception as error:
        raise ObserveError(
            f"example_inputs: the model cannot be copied ({type(error).__name__}: {error}); check it before it is "
            "wrapped, compiled or divided, or say the rows instead: rows={pattern: number}"
        ) from error


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers, and tensors that are plain attributes of modules."""
    import torch

    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, torch.Tensor))


def _fake_of(tensor: Tensor, dtype_of: Callable[[Tensor, bool], Any]) -> Tensor:
    import torch

    is_parameter = isinstance(tensor, torch.nn.Parameter)
    device = "cpu" if tensor.device.type == "meta" else tensor.device
    fake = torch.empty(tensor.shape, dtype=dtype_of(tensor, not is_parameter), device=device)
    return torch.nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake


def _require_no_closure(name: str, module: nn.Module) -> None:
    """Raises ObserveError for a forward that was replaced by a function: it may hold the model, and run that."""
    forward = vars(module).get("forward")
    if isinstance(forward, (FunctionType, functools.partial)):
        raise ObserveError(
            f"example_inputs: the forward of {name or 'the model'} was replaced by a function; check it before that, "
            "or say the rows instead: rows={pattern: number}"
        )


@contextmanager
def quiet(name: str, level: int) -> Iterator[None]:
    """Hear of a library's logger only what is at least of this level."""
    logger = logging.getLogger(name)
    earlier = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(earlier)
