"""Find the linear layers of a model and their sizes, in modules and in configs of modules, without importing torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from fp8gate.filter.model.plain_linear import why_not_plain

_NOT_PRODUCTS = ("embedding_dim", "nf", "normalized_shape")
"""Attributes of layers that have a 2-D weight and yet are no candidates for float8. nn.Embedding looks rows up, norms
scale, and the Conv1D of transformers stores its weight transposed and is no nn.Linear, so torchao cannot convert it."""

ALREADY_FLOAT8 = "already float8"

_TENSOR_PARALLEL = ("tp", "tensor", "tensor_parallel")
"""Names of mesh dimensions that divide layers."""
_STORAGE = ("dp", "fsdp", "dp_shard", "dp_replicate", "dp_shard_cp", "dp_cp", "shard", "replicate", "data")
"""Names of mesh dimensions that divide only what is stored: FSDP gathers the whole weight before it is used."""


class LinearSize(NamedTuple):
    """The sizes of a linear layer.

    is_local: they are those of one rank's part, which no parallel plan divides again. unknown: why it is not known
    whether they are; empty if it is known. refused: why this linear must not be converted, whatever its size, or "".
    is_frozen: its weight needs no gradient.
    """

    in_features: int
    out_features: int
    is_local: bool = False
    unknown: str = ""
    refused: str = ""
    is_frozen: bool = False


def linear_size(layer: object) -> LinearSize | str:
    """The sizes of a layer or layer config. For anything else, the reason why it is no candidate.

    A candidate is any object with integer `in_features` and `out_features` (nn.Linear, torchtitan's Linear.Config), or
    with a 2-D `weight` of shape (out_features, in_features). If tensor parallelism has divided the weight (a DTensor),
    the sizes are those of the local part. torchao's Float8Linear is already converted, and so no candidate.
    """
    if _is_float8(type(layer)):
        return ALREADY_FLOAT8
    weight = getattr(layer, "weight", None)
    is_frozen = getattr(weight, "requires_grad", True) is False
    if hasattr(weight, "placements") and (local := _local_size(layer, weight)):
        return local._replace(refused=why_not_plain(layer), is_frozen=is_frozen)
    in_features, out_features = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if isinstance(in_features, int) and isinstance(out_features, int):
        if not (in_features and out_features):
            return "of no size yet"
        return LinearSize(in_features, out_features, False, "", why_not_plain(layer), is_frozen)
    shape: Any = getattr(weight, "shape", ())
    if len(shape) == 2 and not any(hasattr(layer, attribute) for attribute in _NOT_PRODUCTS):
        return LinearSize(int(shape[1]), int(shape[0]), False, "", why_not_plain(layer), is_frozen)
    return "not a linear layer"


def _local_size(layer: object, weight: Any) -> LinearSize | None:
    """The part that the tensor parallel dimensions of the mesh leave of a weight, or None if they do not divide it."""
    mesh = weight.device_mesh
    sizes = list(weight.shape)
    for i, placement in enumerate(weight.placements):
        if not hasattr(placement, "dim") or mesh.size(i) == 1:
            continue
        divides = _divides_layer(layer, mesh, i)
        if divides is None:
            name = repr(mesh.mesh_dim_names[i]) if mesh.mesh_dim_names else f"{i}, without a name,"
            unknown = f"mesh dimension {name} divides the weight: expected tp, or a name of data parallelism such as dp"
            return LinearSize(int(weight.shape[1]), int(weight.shape[0]), unknown=unknown)
        if divides:
            sizes[placement.dim] = -(-sizes[placement.dim] // mesh.size(i))  # rounded up: the first ranks' part
    if sizes == list(weight.shape):
        return None
    return LinearSize(int(sizes[1]), int(sizes[0]), is_local=True)


def _divides_layer(layer: object, mesh: Any, i: int) -> bool | None:
    """Whether dimension `i` of the mesh divides what is multiplied (True) or only what is stored (False).

    The name of the dimension tells, or else a mark that torch, transformers or FSDP leaves on the layer; FSDP puts its
    dimensions first. None if neither tells.
    """
    name = mesh.mesh_dim_names[i] if mesh.mesh_dim_names else ""
    if name in _TENSOR_PARALLEL:
        return True
    if i == mesh.ndim - 1 and any(getattr(layer, mark, False) for mark in ("_distribute_module_applied", "_is_hooked")):
        return True
    is_storage = name in _STORAGE or getattr(layer, "_is_fsdp_managed_module", False)
    return False if is_storage else None


_FLOAT8: dict[type, bool] = {}


def _is_float8(cls: type) -> bool:
    """Whether this is torchao's Float8Linear, a subclass, or the Config class that torchtitan nests in one."""
    if cls not in _FLOAT8:
        _FLOAT8[cls] = any("Float8Linear" in ancestor.__qualname__.split(".") for ancestor in cls.__mro__)
    return _FLOAT8[cls]


def linears_of(module: Any, fqn: str = "") -> Iterator[tuple[str, Any]]:
    """Every nn.Linear of a model with its name, in the order in which torchao converts them.

    A linear that has two names in one module comes once, under the first: torchao replaces only that one.
    """
    for name, child in module.named_children():
        yield from linears_of(child, f"{fqn}.{name}" if fqn else name)
    if is_torch_linear(type(module)):
        yield fqn, module


_LINEAR: dict[type, bool] = {}


def is_torch_linear(cls: type) -> bool:
    """Whether this is torch's nn.Linear or a subclass, without importing torch."""
    if cls not in _LINEAR:
        _LINEAR[cls] = any((c.__module__, c.__name__) == ("torch.nn.modules.linear", "Linear") for c in cls.__mro__)
    return _LINEAR[cls]
