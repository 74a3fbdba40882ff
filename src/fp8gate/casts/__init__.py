"""Faster float8 casts for torchao's rowwise recipe, in models that are compiled.

Inductor compiles the casts along the columns to kernels that reach 28 to 56 % of a copy's bandwidth on an H100. On,
these casts are found in every graph that Inductor compiles, and kernels of 54 to 67 % do them: in a decoder layer of
Llama 3 8B with all linears in float8, the gain over bf16 rises from 6 to 18 % (LOG.md, 2026-11-26). The model, FSDP,
tensor parallelism and recomputation need nothing else. A cast that is not exactly torchao's is left alone, and so are
the other recipes.

Off by default. On for all that compiles from here on, or inside a context, or by FP8GATE_CASTS=1 in the environment of
a program that calls `enable_if_asked`:

    import fp8gate.casts

    fp8gate.casts.enable()

The logger "fp8gate.casts" has a line at level INFO for each graph that is compiled: how many casts were replaced, of
how many, and why the others were not. A graph that Inductor has in its cache is not compiled, so it has none.

With Inductor's `emulate_precision_casts`, which torchtitan sets for rowwise, all results are equal bit for bit to those
without. Else Inductor does not round an operand to bf16 that it computes while it casts; the kernels read it rounded,
as eager torch does.

Importing this and asking whether it is on load neither torch nor triton; turning it on or off does.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping

from fp8gate.filter.contract.errors import InputError

__all__ = ["VARIABLE", "enable", "enable_if_asked", "is_asked_for", "is_enabled", "not_replaced", "replaced"]

VARIABLE = "FP8GATE_CASTS"
"""The environment variable that `is_asked_for` reads."""


def enable() -> None:
    """Replace casts in all that compiles from now on, backward passes too. Does nothing if it is on already.

    Call it before the first step, in every process, and there in the thread that trains: since torch 2.13 its settings
    are those of a thread. Inside `replaced` or `not_replaced` it holds until their end. If Inductor has another pass of
    its user (`torch._inductor.config.post_grad_custom_post_pass`), that one runs first. Raises InputError if it has
    several, or one that takes more than a graph.
    """
    from fp8gate.casts import graph_pass

    graph_pass.enable()


def replaced(*, strict: bool = False) -> contextlib.AbstractContextManager[None]:
    """Replace casts in what compiles inside; no change if they are already.

    A backward pass compiles when it first runs, so let it run inside. strict: a graph in which none is replaced, and
    one is unknown, does not compile. Raises InputError as `enable` does.
    """
    from fp8gate.casts import graph_pass

    return graph_pass.replaced(strict=strict)


def not_replaced() -> contextlib.AbstractContextManager[None]:
    """Leave the casts in what compiles inside to Inductor. Another pass that was there runs as before."""
    from fp8gate.casts import graph_pass

    return graph_pass.not_replaced()


def is_enabled() -> bool:
    """Whether casts are replaced in what compiles now. Loads nothing: what was never turned on is off."""
    graph_pass = sys.modules.get("fp8gate.casts.graph_pass")
    return graph_pass is not None and graph_pass.is_enabled()


def enable_if_asked(environment: Mapping[str, str] = os.environ) -> bool:
    """Call `enable` if `is_asked_for`. Returns whether it is; raises as that does."""
    asked = is_asked_for(environment)
    if asked:
        enable()
    return asked


def is_asked_for(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether FP8GATE_CASTS is "1"; not if it is "0", empty or not set. Loads nothing.

    Raises InputError for any other value.
    """
    value = environment.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise InputError(f"{VARIABLE}: expected 1 to replace casts, or 0; got {value!r}")
    return value == "1"
