"""Is this a linear layer, and how large: for modules and for configs of modules, without importing torch."""

from __future__ import annotations

from typing import Any

_NOT_PRODUCTS = ("embedding_dim", "nf", "normalized_shape")
"""Attributes of layers with a 2-D weight that are no float8 candidates: nn.Embedding looks its rows up, norms scale,
and the Conv1D of transformers stores its weight transposed and is no nn.Linear, so torchao cannot convert it."""


def linear_size(layer: object) -> tuple[int, int] | str:
    """(in_features, out_features) of a layer or layer config, or for anything else the reason it is no candidate.

    Accepted: any object with integer `in_features` and `out_features` (nn.Linear, torchtitan's Linear.Config), or
    with a 2-D `weight` of shape (out_features, in_features). torchao's Float8Linear is already converted.
    """
    if _is_float8(layer):
        return "already float8"
    sizes = (getattr(layer, "in_features", None), getattr(layer, "out_features", None))
    if all(isinstance(size, int) for size in sizes):
        return sizes if all(sizes) else "of no size yet"  # type: ignore[return-value]
    shape: Any = getattr(getattr(layer, "weight", None), "shape", ())
    if len(shape) == 2 and not any(hasattr(layer, attribute) for attribute in _NOT_PRODUCTS):
        return int(shape[1]), int(shape[0])
    return "not a linear layer"


def _is_float8(layer: object) -> bool:
    """torchao's Float8Linear, subclasses of it, and their nested Config classes as torchtitan has them."""
    return any("Float8Linear" in cls.__qualname__.split(".") for cls in type(layer).__mro__)
