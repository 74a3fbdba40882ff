"""The kinds of layers of a model, and what the model calls them with.

In: a model whose parameters hold no data, the inputs of a microbatch. Out: a `LayerKind` for all layers that do the
same.
The model's forward runs for real around its layers: embeddings, positions and masks are computed. Each layer runs
without data, which shows what its linears multiply, and gives zeros of the shapes that it would give.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fp8gate.calibrate.arms.blueprint import BlockError, by_name, linears_in, named_leaves, on_meta, shapes_in
from fp8gate.filter.contract.plans.layer_names import layers_pattern
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.observe.copy_without_data import FAKE_TENSORS, copy_without_data, quiet
from fp8gate.filter.observe.observe import fake_mode, first_line_of


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKind:
    """Layers of a model that do the same.

    names: of the layers, as `LayerNames` reads it. layers: their names in the model. module: one of them, without data.
    inputs: the keyword arguments that the model calls it with. Those that require a gradient are zeros. shapes: (m, k,
    n) of each role. does: a text that differs from that of every other kind.
    """

    names: str
    layers: tuple[str, ...]
    module: nn.Module
    inputs: Mapping[str, Any]
    shapes: dict[str, LinearShape]
    does: str


def layer_lists(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, dict[int, nn.Module]]]:
    """Each list of layers with an nn.Linear in them, by name: its layers by index. Lists inside a layer are its own."""
    for name, child in model.named_children():
        fqn = f"{prefix}{name}"
        layers = {}
        if isinstance(child, nn.ModuleList):
            layers = {i: one for i, one in enumerate(child) if not isinstance(one, nn.Linear) and any(linears_in(one))}
        if layers:
            yield fqn, layers
        else:
            yield from layer_lists(child, f"{fqn}.")


def layer_kinds(model: nn.Module, calls: Mapping[str, Mapping[str, Any]]) -> tuple[list[LayerKind], list[str]]:
    """The kinds of layers that these calls reach, in forward order, and why others are not among them.

    model: its parameters are on the meta device, its buffers are real. It is left unusable. calls: submodule's name
    ("" for the model) -> the keyword arguments that it is called with, whose tensors are real.
    """
    lists = dict(layer_lists(model))
    if not lists:
        raise BlockError("model: expected a list of layers with an nn.Linear in them; found none")
    _make_outside_real(model, [layer for layers in lists.values() for layer in layers.values()])
    watched = [_WatchedList(name, layers) for name, layers in lists.items()]
    why = "; ".join(filter(None, (_call(model, name, inputs) for name, inputs in calls.items())))
    problems = [f"{one.name}: {why or 'these inputs do not reach it'}" for one in watched if not one.has_seen_all]
    return [kind for one in watched if one.has_seen_all for kind in one.kinds()], problems


class _AllSeen(Exception):
    """The head is reached: no layer comes after it."""


class _WatchedList:
    """One list of layers, each of which notes what it is called with instead of computing."""

    def __init__(self, name: str, layers: Mapping[int, nn.Module]) -> None:
        self.name, self.layers = name, layers
        self._seen: dict[str, _Seen] = {}
        for index, layer in layers.items():
            layer.forward = self._stand_in(index, copy.copy(layer))

    @property
    def has_seen_all(self) -> bool:
        return {index for seen in self._seen.values() for index in seen.indices} == self.layers.keys()

    def kinds(self) -> Iterator[LayerKind]:
        for does, seen in self._seen.items():
            indices = sorted(set(seen.indices))
            is_all = len(indices) == len(self.layers)
            yield LayerKind(
                names=f"{self.name}.*" if is_all else layers_pattern(self.name, indices),
                layers=tuple(f"{self.name}.{i}" for i in indices),
                module=seen.module,
                inputs=seen.inputs,
                shapes=seen.shapes,
                does=does,
            )

    def _stand_in(self, index: int, layer: nn.Module) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            inputs = _said(layer, {**by_name(layer, args), **kwargs})
            does = _what_it_does(layer, inputs)
            if does not in self._seen:
                self._seen[does] = _run_without_data(layer, inputs)
            self._seen[does].indices.append(index)
            return tree_map_only(Tensor, _zeros, self._seen[does].output)

        return note


@dataclass(slots=True)
class _Seen:
    """What is known of one kind of layers. output: on the meta device."""

    module: nn.Module
    inputs: Mapping[str, Any]
    shapes: dict[str, LinearShape]
    output: Any
    indices: list[int] = field(default_factory=list)


def _call(model: nn.Module, name: str, inputs: Mapping[str, Any]) -> str:
    """Call a submodule. Returns why not all of its layers were reached, or ""."""
    called = model.get_submodule(name)
    head = getattr(called, "get_output_embeddings", lambda: None)()
    hook = head.register_forward_pre_hook(_stop) if isinstance(head, nn.Module) else None
    try:
        called(**inputs)
    except _AllSeen:
        return ""
    except Exception as error:
        return first_line_of(error)
    finally:
        if hook:
            hook.remove()
    return ""


def _stop(*_: Any) -> None:
    raise _AllSeen


def _said(layer: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without those that are None by default as well."""
    parameters = inspect.signature(layer.forward).parameters
    required = {name for name, one in parameters.items() if one.default is one.empty}
    return {name: value for name, value in inputs.items() if value is not None or name in required}


def _what_it_does(layer: nn.Module, inputs: Mapping[str, Any]) -> str:
    """A text that is the same for layers that do the same: modules, sizes, settings and inputs.

    Numbers among the settings are left out, as an index of the layer is one; what they change shows in sizes or inputs.
    """
    settings = [sorted(_plain_values(vars(module))) for module in layer.modules()]
    given = sorted(_plain_values(inputs))
    sizes = [(name, tuple(one.shape)) for name, one in layer.named_parameters()]
    leaves = [(name, tuple(one.shape), one.dtype, one.requires_grad) for name, one in named_leaves(inputs)]
    return f"{layer} {settings} {sizes} {given} {leaves}"


def _plain_values(values: Mapping[str, Any]) -> Iterator[str]:
    """Each name, with its value if that is plain: a window of attention may be a pair of numbers."""
    for name, value in values.items():
        kinds = str | bool | int | None if isinstance(value, tuple) else str | bool | None
        is_plain = all(isinstance(one, kinds) for one in (value if isinstance(value, tuple) else (value,)))
        yield f"{name}={value}" if is_plain else name


def _run_without_data(layer: nn.Module, inputs: Mapping[str, Any]) -> _Seen:
    """Raises BlockError for linears of one role that multiply different shapes."""
    mode = fake_mode()
    shadow = copy_without_data(layer, mode, lambda tensor, _: tensor.dtype)
    fakes = tree_map_only(Tensor, lambda tensor: mode.from_tensor(tensor, static_shapes=True), inputs)
    with mode, quiet(*FAKE_TENSORS):
        output, shapes = shapes_in(shadow, lambda: shadow(**fakes))
    return _Seen(layer, inputs, shapes, tree_map_only(Tensor, on_meta, output))


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)


def _make_outside_real(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Give everything but the layers parameters of zeros, of which only what is read takes memory, and let the linears
    there give zeros: what the layers are called with has the right shapes, dtypes and positions, and no values."""
    inside = {id(one) for layer in layers for one in layer.modules()}
    for module in model.modules():
        if id(module) in inside:
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_zeros(parameter.detach()), parameter.requires_grad)
        if isinstance(module, nn.Linear):
            module.forward = functools.partial(_zeros_of, module)  # type: ignore[method-assign]


def _zeros_of(linear: nn.Linear, x: Tensor) -> Tensor:
    is_trained = x.requires_grad or linear.weight.requires_grad
    return x.new_zeros((*x.shape[:-1], linear.out_features)).requires_grad_(is_trained)
