"""The keys of `fp8gate.torchtitan.gate`, as they are given on torchtitan's command line."""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.plain_yaml import convert
from fp8gate.filter.contract.recipes import Casts, require_casts
from fp8gate.filter.decision.lookup import DEFAULT_LOOKUP, LOOKUPS, LookupName
from fp8gate.filter.model.rows import require_row_counts

NAME = "fp8gate.torchtitan.gate"
"""What every error of the override begins with."""
_TORCHAO_RULE = "auto_filter_small_kn"
"""torchtitan takes this entry of filter_fqns for a switch. Its rule converts nothing in torchtitan 0.3.0."""
ConverterRecipe = Literal["rowwise", "rowwise_with_gw_hp"]
"""Those of torchtitan's own converter."""
Recomputed = Literal["none", "full"]


class GateSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of `gate`. Those of the same name mean what they mean for `fp8gate.auto_filter`.

    tokens, tp, cp, recompute: they are taken from the run. Give one to have it checked: another number is an error.
    Only where activation checkpointing runs a part of the forward twice, recompute decides what counts ("none").
    filter_fqns: linears whose name contains one of these stay in bf16. The head and routers do so anyway.
    casts: "fp8gate" turns fp8gate's casts on, and decides by what was measured with them. "inductor" decides by what
    was measured without them. If it is left out, what is enabled counts.
    head: ask about the head as well; `rows` must then say how many rows a call of it multiplies.
    replace: decide also about linears that torchtitan's own Float8LinearConverter has converted.
    emulate: compute float8 in float32, as torchtitan does it to test where the hardware has no float8.
    """

    recipe: ConverterRecipe
    tokens: int | None = None
    tp: int | None = None
    cp: int | None = None
    recompute: Recomputed | None = None
    filter_fqns: tuple[str, ...] = ()
    rows: dict[str, int] = {}
    min_speedup: float | None = None
    lookup: LookupName = DEFAULT_LOOKUP
    plan: str | None = "auto"
    casts: Casts | None = None
    device: str | None = None
    tables: str | None = None
    strict: bool = False
    head: bool = False
    replace: bool = False
    emulate: bool = False


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "recipe": get_args(ConverterRecipe),
    "recompute": (*get_args(Recomputed), None),
    "lookup": LOOKUPS,
    "casts": (*get_args(Casts), None),
}


def read_settings(given: dict[str, Any]) -> GateSettings:
    """Check what was given. Raises InputError, which names the key, what is expected and what was found."""
    if unknown := [key for key in given if key not in GateSettings.__struct_fields__]:
        known = ", ".join(GateSettings.__struct_fields__)
        raise InputError(f"{NAME}: {unknown[0]}: no such key; expected some of {known}")
    for key, choices in _CHOICES.items():
        if (key in given or key == "recipe") and given.get(key) not in choices:
            found = repr(given[key]) if key in given else "nothing"
            which = ", which torchtitan's converter has" if key == "recipe" else ""
            raise InputError(f"{NAME}: {key}: expected one of {', '.join(filter(None, choices))}{which}; got {found}")
    if isinstance(rows := given.get("rows"), dict):
        require_row_counts(rows)
    settings = convert(given, GateSettings, source=NAME, error=InputError)
    if settings.casts:
        try:
            require_casts(settings.recipe, settings.casts)
        except InputError as error:
            raise InputError(f"{NAME}: {error}") from error
    if _TORCHAO_RULE in settings.filter_fqns:
        raise InputError(f"{NAME}: filter_fqns: {_TORCHAO_RULE!r} is torchao's rule, in place of which fp8gate decides")
    return settings
