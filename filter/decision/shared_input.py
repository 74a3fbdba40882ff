"""From which speedup a linear is converted: one that shares its input with others is worth it sooner. Pure.

In: a linear's name, what a forward has shown of it, its shape and a lookup. Out: a `Decision`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP, Decision, decide
from fp8gate.filter.decision.lookup import Lookup
from fp8gate.filter.model.observed import Observation

SHARED_MIN_SPEEDUP = 1.0
"""Linears that multiply the same tensor share the casts of it, which the table counts for each of them: together they
gain more than it says. In twelve blocks of an H200 (`python benchmarks/plan_choices.py`) the set of the table loses
0.4 % of a block on average with this threshold, and 0.8 % with 1.05 for all linears; any from 0.97 to 1.015 gives the
same sets."""

InputKind = Literal["own", "shared", "value"]
"""own: no other linear multiplies the linear's input. shared: others do. value: shared by query, key and value
projections, of which this is the value projection."""

_VALUES = ("v_proj", "wv", "wkv", "value", "v")  # torchtitan builds wk and wv from one config, wkv
_SHARED = (*_VALUES, "q_proj", "k_proj", "wq", "wk", "query", "key", "q", "k", "gate_proj", "up_proj", "w1", "w3")
_KINDS: dict[str, InputKind] = {name: "value" if name in _VALUES else "shared" for name in _SHARED}
"""The last part of a name -> what it suggests."""
_NEVER_ALL = "query, key and value are never all converted"


def input_kind(name: str, observation: Observation | None = None) -> InputKind:
    """How a linear, by its name without wrappers, gets its input: as a forward has shown, else as its name suggests."""
    named = _KINDS.get(name.rpartition(".")[2], "own")
    seen = observation.linears.get(name) if observation else None
    if seen is None or seen.sharing is None or (named == "value" and seen.sharing >= 2):
        return named
    return "shared" if seen.sharing else "own"


def least_speedup(kind: InputKind, min_speedup: float | None) -> float:
    """The speedup from which a linear is converted. min_speedup: the one that was asked for, None for the default."""
    if min_speedup is not None:
        return min_speedup
    return DEFAULT_MIN_SPEEDUP if kind == "own" else SHARED_MIN_SPEEDUP


def decide_linear(
    kind: InputKind,
    shape: LinearShape,
    lookup: Lookup,
    *,
    min_speedup: float | None = None,
    recomputed: bool = False,
    is_frozen: bool = False,
) -> Decision:
    """Choose float8 by the table, as the filter does.

    min_speedup: the threshold for all linears, whatever their input. None: by the kind of input, and where the recipe
    `spares_value`, the value projection stays in bf16.
    """
    least = least_speedup(kind, min_speedup)
    decision = decide(shape, lookup, min_speedup=least, recomputed=recomputed, is_frozen=is_frozen)
    if min_speedup is not None or not decision.convert or decision.speedup is None:
        return decision
    if kind == "value" and RECIPES[lookup.table.recipe].spares_value:
        return msgspec.structs.replace(decision, convert=False, reason=f"{_NEVER_ALL}, {decision.reason}")
    if decision.speedup < DEFAULT_MIN_SPEEDUP:
        return msgspec.structs.replace(decision, reason=f"shares its input, {decision.reason}")
    return decision


def least_text(min_speedup: float | None) -> str:
    """ "1.10x", or both defaults: "1.05x or, for a shared input, 1.00x"."""
    if min_speedup is not None:
        return f"{min_speedup:.2f}x"
    return f"{DEFAULT_MIN_SPEEDUP:.2f}x or, for a shared input, {SHARED_MIN_SPEEDUP:.2f}x"
