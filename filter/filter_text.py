"""The answers of a filter as text for people: a table of linears, and a summary for a log. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fp8gate.filter.contract.names import without_indices
from fp8gate.filter.contract.table import Table
from fp8gate.filter.decision.decide import Decision
from fp8gate.filter.settings import FilterSettings


def decisions_text(decisions: Mapping[str, Decision]) -> str:
    """Every linear with its local shape, decision and reason."""
    from tabulate import tabulate  # deciding must work without it

    rows = [
        (fqn, d.m, d.k, d.n, "float8" if d.convert else "bf16", _ratio(d.speedup), d.reason)
        for fqn, d in decisions.items()
    ]
    headers = ("linear", "m", "k", "n", "train in", "speedup", "reason")
    return tabulate(rows, headers=headers, disable_numparse=True)


def summary_text(
    table: Table,
    settings: FilterSettings,
    decisions: Mapping[str, Decision],
    *,
    plan_source: str | None,
    notes: Mapping[str, Sequence[str]],
) -> str:
    """How many linears are converted, by which plan or speedup, and what should be known about the others.

    plan_source: what messages call the plan, None without a plan. notes: remark -> the names that it is about; it is
    left out if there are none.
    """
    converted = sum(d.convert for d in decisions.values())
    outside = sum(d.outside for d in decisions.values())
    least = f"at least {settings.min_speedup:.2f}x"
    chosen = "by a plan" if plan_source is not None else least
    sentences = [
        f"converted {converted} of {len(decisions)} linears to float8 {table.recipe} "
        f"({chosen} on {table.device.name} at {settings.tokens} tokens)"
    ]
    if plan_source is not None:
        by_table = dict.fromkeys(without_indices(fqn) for fqn, d in decisions.items() if d.point)
        others = f"; not in it, by the table, {least}: {', '.join(by_table)}" if by_table else ""
        sentences.append(f"the plan {plan_source}, whatever min_speedup{others}")
    if outside:
        sentences.append(f"{outside} lie outside the measured range")
    sentences += [f"{remark}: {', '.join(names)}" for remark, names in notes.items() if names]
    return "; ".join(sentences)


def _ratio(speedup: float | None) -> str:
    return "" if speedup is None else f"{speedup:.2f}x"
