"""What a model has to be decided about: its linears, and what looks like one and is left as it is. Imports no torch.

In: an nn.Module, or names with layers or their configs. Out: a `ModelLinears`.
"""

from __future__ import annotations

from collections.abc import Iterator
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


def model_linears(model: Any) -> ModelLinears:
    """Look through an nn.Module, or through (fqn, layer or config) pairs."""
    is_module = hasattr(model, "named_modules")
    sizes = [(fqn, linear_size(layer)) for fqn, layer in (linears_of(model) if is_module else model)]
    found = ModelLinears(
        linears=tuple((fqn, size) for fqn, size in sizes if not isinstance(size, str)),
        already_float8=tuple(fqn for fqn, size in sizes if size == ALREADY_FLOAT8),
    )
    if not is_module:
        return found
    return found._replace(
        left_alone=grouped_weights(model),
        other_products=other_products(model),
        without_linears=tuple(names_without_linears(model)),
    )


def grouped_weights(model: Any) -> tuple[str, ...]:
    """Names of modules that hold several matrices in one parameter, such as grouped experts. Layer indices are *."""
    grouped = (
        fqn
        for fqn, module in model.named_modules()
        if any(p.ndim == 3 and p.shape[0] > 1 for p in module.parameters(recurse=False))
        and not hasattr(module, "kernel_size")
    )
    return tuple(dict.fromkeys(map(without_indices, grouped)))


def other_products(model: Any) -> tuple[str, ...]:
    """Names of modules that multiply by a matrix and are no nn.Linear, such as Conv1D. Layer indices are *."""
    found = (fqn for fqn, module in model.named_modules() if _multiplies(module))
    return tuple(dict.fromkeys(map(without_indices, found)))


def _multiplies(module: Any) -> bool:
    if is_torch_linear(type(module)) or any(hasattr(module, mark) for mark in ("embedding_dim", "kernel_size")):
        return False
    matrices = (p for name, p in module.named_parameters(recurse=False) if name in ("weight", "in_proj_weight"))
    return any(p.ndim == 2 and min(p.shape) > 1 for p in matrices)


def names_without_linears(model: Any) -> Iterator[str]:
    """Names that a parallel plan may contain beside linears: modules without an nn.Linear, and all parameters."""
    for name, module in model.named_modules():
        if not any(is_torch_linear(type(inner)) for inner in module.modules()):
            yield name
    yield from (name for name, _ in model.named_parameters())
