"""Which linears can be converted at all: torchao replaces any nn.Linear, also one whose own code it then drops.

In: a layer or the config of one. Out: why converting it would change or break the model, or nothing.
"""

from __future__ import annotations

import sys
from typing import Any

WEIGHT_DTYPES = ("torch.bfloat16", "torch.float16", "torch.float32")
"""torchao casts weights of these to float8. Packed 4-bit weights are torch.uint8, those of FP8Linear are float8."""
_READ_BY_ITS_PARENT = ("NonDynamicallyQuantizableLinear",)
"""torch's nn.MultiheadAttention makes its out_proj of this class, and gives its weight to one fused function."""


def why_not_plain(layer: object) -> str:
    """Why this nn.Linear is not a plain one, or "". Of other objects, only configs of nn.Linear's are looked into."""
    cls = type(layer)
    base = _torch_linear(cls)
    if base is None:
        owner = _owner(cls)
        base = _torch_linear(owner) if owner else None
        return _own_forward(owner, base) if owner and base else ""
    if cls.__name__ in _READ_BY_ITS_PARENT:
        return "nn.MultiheadAttention reads its weight and never calls it"
    parameters: dict[str, Any] = vars(layer).get("_parameters", {})
    if "weight" not in parameters:
        return "its weight is computed from other parameters, as by weight_norm"
    if reason := _own_forward(cls, base):
        return reason
    if "forward" in vars(layer):
        return "its forward was replaced, as by transformers' tensor parallelism, and conversion would drop that"
    dtype = str(getattr(parameters["weight"], "dtype", ""))
    return "" if dtype in WEIGHT_DTYPES else f"its weight is of {dtype}"


def _own_forward(cls: type, base: type) -> str:
    own = getattr(cls, "forward", None)
    is_plain = own is getattr(base, "forward", None)
    return "" if is_plain else f"{cls.__name__} has a forward of its own, which conversion would drop"


def _torch_linear(cls: type) -> type | None:
    """torch's nn.Linear among a class' ancestors, without importing torch."""
    for ancestor in cls.__mro__:
        if (ancestor.__module__, ancestor.__name__) == ("torch.nn.modules.linear", "Linear"):
            return ancestor
    return None


def _owner(config: type) -> type | None:
    """The class that a config class is nested in: torchtitan's Linear.Config makes a Linear."""
    found: Any = sys.modules.get(config.__module__)
    *outer, _ = config.__qualname__.split(".")
    for name in outer:
        found = getattr(found, name, None)
    return found if outer and isinstance(found, type) else None
