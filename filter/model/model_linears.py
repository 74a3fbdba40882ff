"""What a model has to be decided about: its linears, and what looks like one and is left as it is. Imports no torch.

In: an nn.Module, or names with layers or their configs. Out: a `ModelLinears`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from fp8gate.filter.contract.names import without_indices
from fp8gate.filter.model.linear_layer import ALREADY_FLOAT8, LinearSize, is_torch_linear, linear_size, linears_of


class ModelLinears(NamedTuple):
    """linears: the candidates, by name. already_float8: names of linears that torchao has converted before.

    left_alone: names of modules that hold several matrices in one parameter. other_products: names of modules that
    multiply by a matrix and are no nn.Linear. without_linears: names that a parallel plan may contain beside linears.
    The last three are None where only names and layers are known.
    """

    linears: tuple[tuple[str, LinearSize], ...] = ()
    already_float8: tuple[str, ...] = ()
    left_alone: tuple[str, ...] | None = None
    other_products: tuple[str, ...] | None = None
    without_linears: tuple[str, ...] | None = None


def model_linears(model: Any, *, with_other_names: bool) -> ModelLinears:
    """Look through an nn.Module, or through (fqn, layer or config) pairs. with_other_names: find `without_linears`."""
    is_module = hasattr(model, "named_modules")
    sizes = [(fqn, linear_size(layer)) for fqn, layer in (linears_of(model) if is_module else model)]
    found = ModelLinears(
        linears=tuple((fqn, size) for fqn, size in sizes if not isinstance(size, str)),
        already_float8=tuple(fqn for fqn, size in sizes if size == ALREADY_FLOAT8),
    )
    if not is_module:
        return found
    modules = list(model.named_modules())
    return found._replace(
        left_alone=_unique_names(modules, _is_grouped),
        other_products=_unique_names(modules, _multiplies),
        without_linears=tuple(_names_without_linears(model)) if with_other_names else (),
    )


def grouped_weights(model: Any) -> tuple[str, ...]:
    """Names of modules that hold several matrices in one parameter, such as grouped experts. Layer indices are *."""
    return _unique_names(model.named_modules(), _is_grouped)


def other_products(model: Any) -> tuple[str, ...]:
    """Names of modules that multiply by a matrix and are no nn.Linear, such as Conv1D. Layer indices are *."""
    return _unique_names(model.named_modules(), _multiplies)


def _unique_names(modules: Iterable[tuple[str, Any]], is_meant: Callable[[Any], bool]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(without_indices(fqn) for fqn, module in modules if is_meant(module)))


def _is_grouped(module: Any) -> bool:
    """A first dimension of 1 is that of class tokens and positions."""
    grouped = any(_ndim(p) == 3 and p.shape[0] > 1 for p in module._parameters.values())
    return grouped and not hasattr(module, "kernel_size")


def _multiplies(module: Any) -> bool:
    """Whether it holds a matrix and is neither an nn.Linear nor an embedding or a convolution."""
    if is_torch_linear(type(module)):
        return False
    matrices = (module._parameters.get(name) for name in ("weight", "in_proj_weight"))
    if not any(_ndim(p) == 2 and min(p.shape) > 1 for p in matrices):
        return False
    return not any(hasattr(module, mark) for mark in ("embedding_dim", "kernel_size"))


def _ndim(parameter: Any) -> int:
    """0 for none, and for one that a lazy module has yet to shape."""
    is_shaped = parameter is not None and not hasattr(parameter, "materialize")
    return int(parameter.ndim) if is_shaped else 0


def _names_without_linears(model: Any) -> Iterator[str]:
    """Names that a parallel plan may contain beside linears: modules without an nn.Linear, and all parameters."""
    for name, module in model.named_modules():
        if not any(is_torch_linear(type(inner)) for inner in module.modules()):
            yield name
    yield from (name for name, _ in model.named_parameters())
