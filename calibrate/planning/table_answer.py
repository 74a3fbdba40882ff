"""What is known of a block before anything is measured: the table's answer and torchao's, where the search starts.

In: a subject, a recipe, a folder of tables. Out: a `TableAnswer`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fp8gate.calibrate.arms.blueprint import linears_in
from fp8gate.calibrate.planning.search import RoleSet
from fp8gate.calibrate.planning.subject import Subject
from fp8gate.filter.contract.names import block_role
from fp8gate.filter.contract.plans.plan import TableUsed
from fp8gate.filter.contract.recipes import Recipe, Variant
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Table, TableError
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP
from fp8gate.filter.decision.lookup import Lookup
from fp8gate.filter.decision.shared_input import decide_linear, input_kind
from fp8gate.filter.decision.torchao_rule import torchao_converts
from fp8gate.filter.locate.find_table import find_table


@dataclass(frozen=True, slots=True)
class TableAnswer:
    """The sets to start from. saved_us: what the table says each role's linears save, timed alone."""

    table: TableUsed | None
    torchao: tuple[str, ...] | None
    saved_us: dict[str, float]
    guesses: list[RoleSet]

    @classmethod
    def of(
        cls, subject: Subject, variant: Variant, device: str, tables: Path | None, say: Callable[[str], None]
    ) -> TableAnswer:
        shapes = subject.blueprint.shapes
        possible = subject.possible
        rule = {role: _torchao(variant.recipe, subject.whole[role]) for role in possible}
        torchao = None if None in rule.values() else tuple(role for role, convert in rule.items() if convert)
        guesses = [frozenset(possible)] if torchao is None else [frozenset(torchao), frozenset(possible)]
        try:
            table, _ = find_table(variant.recipe, casts=variant.casts, device=device, tables=tables)
        except TableError as error:
            why = error.on_command_line or error
            say(f"{why}; so the search starts without a table, which the filter needs beside a plan")
            return cls(None, torchao, {}, guesses)
        lookup, recomputed = Lookup(table), subject.blueprint.recomputed
        convert = [
            role
            for role in possible
            if decide_linear(input_kind(role), shapes[role], lookup, recomputed=recomputed).convert
        ]
        counts = Counter(block_role(name) for name, _ in linears_in(subject.blueprint.template))
        saved_us = {role: counts[role] * _saved_us(shapes[role], lookup, recomputed) for role in possible}
        return cls(_used(table, convert), torchao, saved_us, [frozenset(convert), *guesses])

    def predicted(self, candidate: RoleSet, bf16_us: float) -> float | None:
        if self.table is None:
            return None
        return bf16_us / max(bf16_us - sum(self.saved_us[role] for role in candidate), 1.0)


def _torchao(recipe: Recipe, sizes: tuple[int, int]) -> bool | None:
    return torchao_converts(recipe, in_features=sizes[0], out_features=sizes[1])


def _saved_us(shape: LinearShape, lookup: Lookup, recomputed: bool) -> float:
    estimate = lookup(shape)
    if estimate is None:
        return 0.0
    estimate = estimate.recomputed() if recomputed else estimate
    return estimate.bf16_us - estimate.fp8_us


def _used(table: Table, convert: Sequence[str]) -> TableUsed:
    return TableUsed(
        measured_at=table.measured_at,
        torch=table.software.torch,
        min_speedup=DEFAULT_MIN_SPEEDUP,
        convert=tuple(convert),
    )
