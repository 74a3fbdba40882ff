"""Set-ups: all that makes measurements comparable, and the protocol by which points are measured.

In: a device. Out: a `Setup`: the device, the software, and a protocol for each recipe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import msgspec
import torch

from fp8gate.calibrate.arms.linear import DATA
from fp8gate.calibrate.device.registry import describe_device, describe_software, kind_of, require_compiler
from fp8gate.filter.contract.recipes import RECIPES, Casts, Recipe, Variant, recipes_with
from fp8gate.filter.contract.table import Device, Software, SweepProtocol

POINT_SETTLE_S, POINT_RUN_S = 0.1, 0.05
"""An arm runs alone on the device, for POINT_SETTLE_S uncounted and then for POINT_RUN_S or longer. At the power limit
the clock follows what runs (H200, 700 W): 1485 MHz for a bf16 product, 1890 MHz for a rowwise one full of casts. Arms
that take turns share a clock that neither has in training, which made rowwise up to 18 % slower against bf16 than it
is. The GPU sets its clock every 0.1 s: an arm that has settled for less runs at the clock of the arm before it (LOG.md,
2026-11-24)."""
POINT_PAUSE_S = 0.15
"""How long a device at its power limit idles before a run; `measure_point` says when."""
CONFIDENCE = 0.99
THRESHOLD = 1.0
TOLERANCE = 0.01
NEAR = 0.03
"""Where a second run is made, speedups within 3 % of the threshold have one."""


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A set-up as the first line of a journal. What another set-up has measured is in another journal."""

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:8]


class Setup(Header, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The set-up of a sweep."""

    device: Device
    software: Software
    protocols: dict[Recipe, SweepProtocol]

    def variant(self, recipe: Recipe) -> Variant:
        """What the recipe's table is of."""
        return Variant(recipe, self.protocols[recipe].casts)


def make_setup(device: torch.device, casts: Casts = "inductor") -> Setup:
    """Production's settings on this device: on a GPU compiled, under CUDA graphs; on a CPU eager.

    casts: who compiles those of float8; the set-up is of the recipes that can have these. Raises InputError if they are
    asked for where nothing is compiled.
    """
    defaults = kind_of(device).defaults
    if casts != "inductor":
        require_compiler(device, "casts")
    protocols = {
        recipe: SweepProtocol(
            timer=defaults.timer,
            compile=defaults.compiles,
            inductor=RECIPES[recipe].inductor if defaults.compiles else {},
            casts=casts,
            bf16="eager",
            l2="cold",
            data=DATA,
            settle_s=POINT_SETTLE_S,
            run_s=POINT_RUN_S,
            pause_s=POINT_PAUSE_S,
            rounds=defaults.rounds,
            confidence=CONFIDENCE,
            threshold=THRESHOLD,
            tolerance=TOLERANCE,
            near=NEAR,
            control=defaults.control,
        )
        for recipe in recipes_with(casts)
    }
    return Setup(device=describe_device(device), software=describe_software(device), protocols=protocols)


def differences(one: msgspec.Struct, other: msgspec.Struct) -> Iterator[tuple[str, object, object]]:
    """The fields in which two devices, softwares or protocols differ, in alphabetical order, and what each has."""
    ours, theirs = msgspec.to_builtins(one), msgspec.to_builtins(other)
    for field in sorted(ours.keys() | theirs.keys()):
        if ours.get(field) != theirs.get(field):
            yield field, ours.get(field), theirs.get(field)
