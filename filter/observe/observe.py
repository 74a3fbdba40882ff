"""Look at a model: run its forward once without computing, and see what each linear multiplies.

In: a model, example inputs of one microbatch. Out: an `Observation`: rows and calls of each linear by name.
The forward runs on a copy whose tensors have shapes and no data: it takes no memory, and the model does not change.
"""

from __future__ import annotations

import gc
import random
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.names import plain_name
from fp8gate.filter.model.linear_layer import linears_of
from fp8gate.filter.model.observed import Observation, ObservedLinear, ObserveError
from fp8gate.filter.observe.copy_without_data import FAKE_TENSORS, copy_without_data, quiet

if TYPE_CHECKING:
    from torch import Tensor, nn

ExampleInputs = Any
"""A tuple of positional arguments, a mapping of keyword arguments, or a list of these: several microbatches."""


Bf16Way = Literal["parameters", "all", "nothing"]
BF16_WAYS: tuple[Bf16Way, ...] = ("parameters", "all", "nothing")
"""What is taken to be in bf16, as in float8 training. Some models keep buffers in float32 (rotary frequencies), some
want all in one dtype, and some mix in float32 and run in their own dtypes only."""


class LeakError(ObserveError):
    """The forward has left tensors without data somewhere in the process."""


def observe(model: nn.Module, example_inputs: ExampleInputs) -> Observation:
    """See what each linear of a model multiplies, for each of the example inputs; the fewest rows count.

    example_inputs: as `ExampleInputs` says. Of tensors only shapes and dtypes count, so they may be on the meta device.
    Raises ObserveError if the forward fails without data, which names the cause, and InputError for no inputs.
    """
    if not hasattr(model, "named_modules"):
        raise InputError(f"example_inputs: expected a model that can be called; got {type(model).__name__}")
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
        except LeakError:
            raise
        except ObserveError as error:
            failed = failed or error
    assert failed
    raise failed


def _run_without_data(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, in_bf16: Bf16Way
) -> Observation:
    mode = fake_mode()
    found = _run_in(mode, model, args, kwargs, in_bf16)
    _require_no_leak(mode)
    return found


def _run_in(
    mode: Any, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], in_bf16: Bf16Way
) -> Observation:
    """What a copy of the model does. The copy, and all that it made, is gone when this returns."""
    import torch
    from torch.utils._pytree import tree_map

    def dtype_of(tensor: Tensor, is_buffer: bool = False) -> torch.dtype:
        is_number = tensor.dtype in (torch.float32, torch.float16)
        is_cast = in_bf16 == "all" or (in_bf16 == "parameters" and not is_buffer)
        return torch.bfloat16 if is_number and is_cast else tensor.dtype

    shadow = copy_without_data(model, mode, dtype_of)
    device = next((tensor.device for tensor in shadow.parameters()), torch.device("cpu"))

    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty(value.shape, dtype=dtype_of(value), device=device)

    linears = dict(linears_of(shadow))
    notes = {id(linear): _Notes() for linear in linears.values()}
    inputs = SharedInputs()
    for linear in linears.values():
        linear.register_forward_pre_hook(_note_call(notes[id(linear)], inputs), with_kwargs=True)
    weights = {id(getattr(linear, "weight", None)): notes[id(linear)] for linear in linears.values()}
    dtype = torch.get_default_dtype() if in_bf16 == "nothing" else torch.bfloat16
    with mode, _same_random_numbers(), _noting_reads(weights), default_dtype(dtype), quiet(*FAKE_TENSORS):
        try:
            shadow.train()
            shadow(*tree_map(fake, args), **tree_map(fake, kwargs))
        except Exception as error:
            raise ObserveError(f"example_inputs: {_cause(error)}") from error
    return Observation({plain_name(name): notes[id(linear)].result() for name, linear in linears.items()})


def _require_no_leak(mode: Any) -> None:
    """Raises ObserveError if the forward has kept tensors without data: the model would later compute with them."""
    from torch._subclasses.fake_tensor import FakeTensor

    gc.collect()
    if any(type(value) is FakeTensor and value.fake_mode is mode for value in gc.get_objects()):
        raise LeakError(
            "example_inputs: the forward keeps tensors outside of the model, in a cache such as functools.lru_cache, "
            "and now keeps some without data; start this process again, and say the rows instead: "
            "rows={pattern: number}"
        )


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """What comes after draws the numbers that it would have drawn: from torch, Python and numpy."""
    import torch

    numpy = sys.modules.get("numpy")
    earlier, arrays = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(earlier)
        if numpy:
            numpy.random.set_state(arrays)


@contextmanager
def default_dtype(dtype: Any) -> Iterator[None]:
    """The dtype of what is made without saying which."""
    import torch

    earlier = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(earlier)


def fake_mode() -> Any:
    """Tensors without data; what depends on data has a symbol for a size."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


@dataclass(slots=True)
class _Notes:
    """What is seen of one linear during a forward. users: for each call, the linears that multiply the same tensor."""

    calls: int = 0
    rows: list[int | None] = field(default_factory=list)
    users: list[set[int]] = field(default_factory=list)
    is_read: bool = False
    is_inside: bool = False

    def result(self) -> ObservedLinear:
        known = [rows for rows in self.rows if rows is not None]
        fewest = min(known) if known and len(known) == len(self.rows) else None
        sharing = min((len(users) - 1 for users in self.users), default=None)
        return ObservedLinear(calls=self.calls, rows=fewest, is_read=self.is_read and not self.calls, sharing=sharing)


class SharedInputs:
    """The tensors that linears were called with. None is kept alive, so a later one may have an earlier one's id."""

    def __init__(self) -> None:
        self._users: dict[int, tuple[weakref.ref[Tensor], set[int]]] = {}

    def users(self, value: Tensor) -> set[int]:
        """The linears that were called with this very tensor, by id: a set to add the next one to."""
        known = self._users.get(id(value))
        if known is None or known[0]() is not value:
            known = self._users[id(value)] = weakref.ref(value), set()
        return known[1]


def _note_call(notes: _Notes, inputs: SharedInputs) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        (value, *_) = (*args, *kwargs.values())
        count = 1
        for size in value.shape[:-1]:
            count = count * size
        notes.calls += 1
        notes.rows.append(count if isinstance(count, int) else count.node.maybe_as_int())
        users = inputs.users(value)
        users.add(id(notes))
        notes.users.append(users)

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


def _cause(error: Exception) -> str:
    """Why a forward failed, and what to do instead."""
    why = first_line_of(error)
    return f"the forward cannot be run without data ({why}); say the rows instead: rows={{pattern: number}}"


def first_line_of(error: Exception) -> str:
    """An error with the first line of its text: torch and transformers write many in some."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
