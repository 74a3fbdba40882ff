"""Is this a linear layer, and how large: for modules and for configs of modules, without importing torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_NOT_PRODUCTS = ("embedding_dim", "nf", "normalized_shape")
"""Attributes of layers with a 2-D weight that are no float8 candidates: nn.Embedding looks its rows up, norms scale,
and the Conv1D of transformers stores its weight transposed and is no nn.Linear, so torchao cannot convert it."""

_TENSOR_PARALLEL = ("tp", "tensor", "tensor_parallel")
"""Names of the mesh dimension that divides layers. Others (dp, fsdp, ...) divide storage: FSDP gathers before use."""


class LinearSize(NamedTuple):
    """A layer's sizes. is_local: a rank's part already, which no plan divides again."""

    in_features: int
    out_features: int
    is_local: bool = False


def linear_size(layer: object) -> LinearSize | str:
    """The sizes of a layer or layer config, or for anything else the reason it is no candidate.

    Accepted: any object with integer `in_features` and `out_features` (nn.Linear, torchtitan's Linear.Config), or
    with a 2-D `weight` of shape (out_features, in_features). Of a weight that tensor parallelism has divided (a
    DTensor), the local part counts. torchao's Float8Linear is already converted.
    """
    if _is_float8(type(layer)):
        return "already float8"
    weight = getattr(layer, "weight", None)
    if hasattr(weight, "placements") and (local := _local_size(layer, weight)):
        return local
    in_features, out_features = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if isinstance(in_features, int) and isinstance(out_features, int):
        return LinearSize(in_features, out_features) if in_features and out_features else "of no size yet"
    shape: Any = getattr(weight, "shape", ())
    if len(shape) == 2 and not any(hasattr(layer, attribute) for attribute in _NOT_PRODUCTS):
        return LinearSize(int(shape[1]), int(shape[0]))
    return "not a linear layer"


def _local_size(layer: object, weight: Any) -> LinearSize | None:
    """What the tensor parallel dimensions of the weight's mesh leave of it, or None if they do not divide it.

    Without names, a mesh is a tensor parallel one if `parallelize_module` has marked the layer.
    """
    mesh = weight.device_mesh
    names = mesh.mesh_dim_names or [""] * mesh.ndim
    if mesh.ndim == 1 and _is_parallelized(layer):
        names = [_TENSOR_PARALLEL[0]]
    sizes = list(weight.shape)
    for i, (name, placement) in enumerate(zip(names, weight.placements, strict=True)):
        if name in _TENSOR_PARALLEL and hasattr(placement, "dim"):
            sizes[placement.dim] = -(-sizes[placement.dim] // mesh.size(i))  # the first ranks' part if it is uneven
    if sizes == list(weight.shape):
        return None
    return LinearSize(int(sizes[1]), int(sizes[0]), is_local=True)


def _is_parallelized(layer: object) -> bool:
    return getattr(layer, "_distribute_module_applied", False)


_FLOAT8: dict[type, bool] = {}


def _is_float8(cls: type) -> bool:
    """torchao's Float8Linear, subclasses of it, and their nested Config classes as torchtitan has them."""
    if cls not in _FLOAT8:
        _FLOAT8[cls] = any("Float8Linear" in ancestor.__qualname__.split(".") for ancestor in cls.__mro__)
    return _FLOAT8[cls]


def linears_of(module: Any, fqn: str = "") -> Iterator[tuple[str, Any]]:
    """Every nn.Linear of a model in torchao's order: of two names in one module it replaces the first alone."""
    for name, child in module.named_children():
        yield from linears_of(child, f"{fqn}.{name}" if fqn else name)
    if _is_torch_linear(type(module)):
        yield fqn, module


def grouped_weights(model: Any) -> tuple[str, ...]:
    """Modules that hold several matrices in one parameter, such as grouped experts; layer indices as *."""
    grouped = (fqn for fqn, m in model.named_modules() if any(p.ndim == 3 for p in m.parameters(recurse=False)))
    return tuple(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", fqn) for fqn in grouped))


def _is_torch_linear(cls: type) -> bool:
    return any((c.__module__, c.__name__) == ("torch.nn.modules.linear", "Linear") for c in cls.__mro__)
