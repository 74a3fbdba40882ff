"""Look at a model: run its forward once without computing, and see what each linear multiplies.

In: a model, example inputs of one microbatch. Out: an `Observation`: rows and calls of each linear by name.
The forward runs on a copy whose tensors have shapes and no data: it takes no memory, and the model does not change.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.model.linear_layer import linears_of

if TYPE_CHECKING:
    from torch import Tensor, nn

ExampleInputs = Any
"""A tuple of positional arguments, a mapping of keyword arguments, or a list of these: several microbatches."""


Bf16Way = Literal["parameters", "all", "nothing"]
BF16_WAYS: tuple[Bf16Way, ...] = ("parameters", "all", "nothing")
"""What is taken to be in bf16, as in float8 training. Some models keep buffers in float32 (rotary frequencies), some
want all in one dtype, and some mix in float32 and run in their own dtypes only."""


class ObserveError(InputError):
    """The model's forward cannot be run without computing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObservedLinear:
    """What one linear did in a forward.

    calls: how often it was called as a module. rows: the fewest rows of its input in one call; None if it was not
    called, or if their number depends on the data. is_read: its weight was used without a call.
    """

    calls: int = 0
    rows: int | None = None
    is_read: bool = False


@dataclass(frozen=True, slots=True)
class Observation:
    """linears: by name in the model, without those that several names share under their later names."""

    linears: Mapping[str, ObservedLinear]

    def worst(self, other: Observation) -> Observation:
        """Both together: the fewest rows count, as they gain least from float8."""
        names = dict.fromkeys((*self.linears, *other.linears))
        return Observation({name: _worst(self.linears[name], other.linears[name]) for name in names})


def observe(model: nn.Module, example_inputs: ExampleInputs) -> Observation:
    """See what each linear of a model multiplies, for each of the example inputs; the fewest rows count.

    example_inputs: as `ExampleInputs` says. Of tensors only shapes and dtypes count, so they may be on the meta device.
    Raises ObserveError if the forward fails without data, which names the cause, and InputError for no inputs.
    """
    calls = [_arguments(one) for one in _microbatches(example_inputs)]
    if not calls:
        raise InputError("example_inputs: expected the arguments of one microbatch; got none")
    found = [_observe_once(model, args, kwargs) for args, kwargs in calls]
    worst = found[0]
    for other in found[1:]:
        worst = worst.worst(other)
    return worst


def _microbatches(example_inputs: ExampleInputs) -> Sequence[Any]:
    return example_inputs if isinstance(example_inputs, list) else [example_inputs]


def _arguments(one: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of one microbatch."""
    import torch

    if isinstance(one, Mapping):
        return (), dict(one)
    if isinstance(one, tuple):
        return one, {}
    if isinstance(one, torch.Tensor):
        return (one,), {}
    raise InputError(
        f"example_inputs: expected a tensor, a tuple of arguments, a mapping of keyword arguments, or a list of these; "
        f"got {type(one).__name__}"
    )


def _observe_once(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Observation:
    """The first way in which the forward runs. Raises the first way's ObserveError if it runs in none."""
    failed: ObserveError | None = None
    for in_bf16 in BF16_WAYS:
        try:
            return _run_without_data(model, args, kwargs, in_bf16=in_bf16)
        except ObserveError as error:
            failed = failed or error
    assert failed
    raise failed


def _run_without_data(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, in_bf16: Bf16Way
) -> Observation:
    import torch
    from torch.utils._pytree import tree_map

    def dtype_of(tensor: Tensor, is_buffer: bool = False) -> torch.dtype:
        is_number = tensor.dtype in (torch.float32, torch.float16)
        is_cast = in_bf16 == "all" or (in_bf16 == "parameters" and not is_buffer)
        return torch.bfloat16 if is_number and is_cast else tensor.dtype

    mode = _fake_mode()
    shadow = _copy_without_data(model, mode, dtype_of)
    device = next((tensor.device for tensor in shadow.parameters()), torch.device("cpu"))

    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty(value.shape, dtype=dtype_of(value), device=device)

    linears = dict(linears_of(shadow))
    notes = {id(linear): _Notes() for linear in linears.values()}
    for linear in linears.values():
        linear.register_forward_pre_hook(_note_call(notes[id(linear)]), with_kwargs=True)
    weights = {id(getattr(linear, "weight", None)): notes[id(linear)] for linear in linears.values()}
    dtype = torch.get_default_dtype() if in_bf16 == "nothing" else torch.bfloat16
    with mode, torch.random.fork_rng(devices=[]), _noting_reads(weights), _default_dtype(dtype), _quiet():
        try:
            shadow.train()
            shadow(*tree_map(fake, args), **tree_map(fake, kwargs))
        except Exception as error:
            raise ObserveError(f"example_inputs: {_cause(error)}") from error
    return Observation({name: notes[id(linear)].result() for name, linear in linears.items()})


@contextmanager
def _default_dtype(dtype: Any) -> Iterator[None]:
    import torch

    earlier = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(earlier)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs the traceback of an operation that fails without data, beside raising it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    earlier = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(earlier)


def _fake_mode() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def _copy_without_data(model: nn.Module, mode: Any, dtype_of: Callable[[Tensor, bool], Any]) -> nn.Module:
    """A copy in which every parameter and buffer is a fake tensor of the same shape and device."""
    import torch

    memo: dict[int, Tensor] = {}
    with mode:
        for tensor in (*model.parameters(), *model.buffers()):
            device = "cpu" if tensor.device.type == "meta" else tensor.device
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            fake = torch.empty(tensor.shape, dtype=dtype_of(tensor, not is_parameter), device=device)
            memo[id(tensor)] = torch.nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
        try:
            shadow = copy.deepcopy(model, memo)
        except Exception as error:
            raise ObserveError(
                f"example_inputs: the model cannot be copied ({type(error).__name__}: {error}); check it before it is "
                "wrapped, compiled or divided"
            ) from error
    for module in shadow.modules():  # hooks may print, count or communicate
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            hooks.clear()
    return shadow


@dataclass(slots=True)
class _Notes:
    """What is seen of one linear during a forward."""

    calls: int = 0
    rows: list[int | None] = field(default_factory=list)
    is_read: bool = False
    is_inside: bool = False

    def result(self) -> ObservedLinear:
        known = [rows for rows in self.rows if rows is not None]
        fewest = min(known) if known and len(known) == len(self.rows) else None
        return ObservedLinear(calls=self.calls, rows=fewest, is_read=self.is_read and not self.calls)


def _note_call(notes: _Notes) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        (value, *_) = (*args, *kwargs.values())
        count = 1
        for size in value.shape[:-1]:
            count = count * size
        notes.calls += 1
        notes.rows.append(count if isinstance(count, int) else count.node.maybe_as_int())

    return hook


@contextmanager
def _noting_reads(weights: Mapping[int, _Notes]) -> Iterator[None]:
    """Note which of these tensors, by id, are given to any function of torch."""
    from torch.overrides import TorchFunctionMode
    from torch.utils._pytree import tree_leaves

    class Noting(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for value in tree_leaves((args, kwargs or {})):
                if notes := weights.get(id(value)):
                    notes.is_read = True
            return func(*args, **(kwargs or {}))

    with Noting():
        yield


def _worst(one: ObservedLinear, other: ObservedLinear) -> ObservedLinear:
    if not one.calls or not other.calls:
        called = one if one.calls else other
        return ObservedLinear(calls=called.calls, rows=called.rows, is_read=one.is_read or other.is_read)
    rows = None if one.rows is None or other.rows is None else min(one.rows, other.rows)
    return ObservedLinear(calls=max(one.calls, other.calls), rows=rows)


def _cause(error: Exception) -> str:
    """Why a forward failed, and what to do instead."""
    first = str(error).strip().splitlines()
    return (
        f"the forward cannot be run without data ({type(error).__name__}: {first[0] if first else ''}); say the rows "
        "instead: rows={pattern: number}"
    )
