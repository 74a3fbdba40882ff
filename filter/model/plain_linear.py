"""Which linears can be converted at all: torchao replaces any nn.Linear, also one whose own code it then drops.

In: a layer or the config of one. Out: why converting it would change or break the model, or nothing.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Iterable, Mapping
from typing import Any

WEIGHT_DTYPES = ("torch.bfloat16", "torch.float16", "torch.float32")
"""torchao casts weights of these to float8. Packed 4-bit weights are torch.uint8, those of FP8Linear are float8."""
_READ_BY_ITS_PARENT = ("NonDynamicallyQuantizableLinear",)
"""torch's nn.MultiheadAttention makes its out_proj of this class, and gives its weight to one fused function."""
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Where an nn.Module keeps what runs around its forward and backward: torchao's conversion makes a module without."""
_hooks_of = operator.itemgetter(*HOOKS)
_HOOKS_OF_DIVIDING = "torch.distributed."
"""FSDP and tensor parallelism hook what they divide. A model that is converted after that fails in its forward."""


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
    attributes = vars(layer)
    parameters: dict[str, Any] = attributes.get("_parameters", {})
    if "weight" not in parameters:
        return "its weight is computed from other parameters, as by weight_norm"
    if reason := _own_forward(cls, base):
        return reason
    if "forward" in attributes:
        return "its forward was replaced, as by transformers' tensor parallelism, and conversion would drop that"
    dtype = str(getattr(parameters["weight"], "dtype", ""))
    if dtype not in WEIGHT_DTYPES:
        return f"its weight is of {dtype}"
    kinds = _hooks_of(attributes)
    if any(kinds) and (hook := _own_hook(kinds)):
        return f"conversion would drop its hooks, such as {hook}; register them after it"
    return ""


def _own_forward(cls: type, base: type) -> str:
    own = getattr(cls, "forward", None)
    is_plain = own is getattr(base, "forward", None)
    return "" if is_plain else f"{cls.__name__} has a forward of its own, which conversion would drop"


def _own_hook(kinds: Iterable[Mapping[int, Any]]) -> str:
    """The name of the first hook that conversion would silently drop, or ""."""
    names = (_dotted_name(hook) for hooks in kinds for hook in hooks.values())
    return next((name for name in names if not name.startswith(_HOOKS_OF_DIVIDING)), "")


def _dotted_name(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return f"{hook.__module__}.{getattr(hook, '__qualname__', type(hook).__qualname__)}"


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
