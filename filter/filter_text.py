"""The answers of a filter as text for people: a table of linears, and a summary for a log. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from fp8gate.filter.contract.names import without_indices
from fp8gate.filter.contract.plans.plan_file import are_complete
from fp8gate.filter.contract.shapes import TOKEN_TILE
from fp8gate.filter.contract.software_check import stale
from fp8gate.filter.contract.table import Table
from fp8gate.filter.decision.decide import Decision
from fp8gate.filter.decision.estimate import OF_ALIGNED
from fp8gate.filter.decision.shared_input import least_text
from fp8gate.filter.locate.incomplete_table import completing_command
from fp8gate.filter.planned.incomplete_plan import completing_plan_command, how_far
from fp8gate.filter.planned.plan_choice import PlanChoice
from fp8gate.filter.policy.settings import FilterSettings
from fp8gate.filter.shapes_command import shapes_command


def decisions_text(decisions: Mapping[str, Decision], *, full: bool) -> str:
    """The linears with their local shape, decision and reason: those that differ by layer indices only in one row.

    full: every linear in a row of its own. Where rows come from is said if some are not the tokens.
    """
    from fp8gate.filter.terminal_table import render_table  # deciding must work without it

    counts = Counter((fqn if full else without_indices(fqn), decision) for fqn, decision in decisions.items())
    columns = {
        "linear": [fqn for fqn, _ in counts],
        "count": list(counts.values()),
        "rows from": [d.rows_from for _, d in counts],
        **{size: [getattr(d, size) for _, d in counts] for size in ("m", "k", "n")},
        "train in": ["float8" if d.convert else "bf16" for _, d in counts],
        "speedup": [d.speedup_text for _, d in counts],
        "reason": [d.reason for _, d in counts],
    }
    if full:
        del columns["count"]
    if all(d.rows_from == "tokens" for d in decisions.values()):
        del columns["rows from"]
    return render_table(list(columns), list(zip(*columns.values(), strict=True)))


def summary_text(
    table: Table,
    path: Path,
    settings: FilterSettings,
    decisions: Mapping[str, Decision],
    *,
    plans: PlanChoice,
    notes: Mapping[str, Sequence[str]],
) -> str:
    """How many linears are converted, by which plan or speedup, and what should be known about the others.

    path: of the table. notes: remark -> the names that it is about; it is left out if there are none.
    """
    converted = sum(d.convert for d in decisions.values())
    least = f"at least {least_text(settings.min_speedup)}"
    by_plan = plans.chosen is not None and any(d.planned for d in decisions.values())
    chosen = "by a plan" if by_plan else least
    sentences = [
        f"converted {converted} of {len(decisions)} linears to float8 {table.variant} "
        f"({chosen} on {table.device.name} at {settings.tokens} tokens)"
    ]
    if plans.chosen:
        by_table = dict.fromkeys(without_indices(fqn) for fqn, d in decisions.items() if d.point)
        others = f"; not in it, by the table, {least}: {', '.join(by_table)}" if by_table else ""
        extent = ", whatever min_speedup" if by_plan else " decides none of them"
        sentences.append(f"the plan {plans.chosen.source}{extent}{others}")
        sentences += plans.chosen.remarks()
    if remark := plans.remark():
        sentences.append(remark)
    if outside := [fqn for fqn, d in decisions.items() if d.outside]:
        names = ", ".join(dict.fromkeys(map(without_indices, outside)))
        command = f"{shapes_command('CONFIG.json', settings)}{table.variant.option}"
        sentences.append(f"outside the measured range: {len(outside)} ({names}); to measure them: {command}")
    if unaligned := dict.fromkeys(without_indices(fqn) for fqn, d in decisions.items() if d.unaligned is None):
        sentences.append(f"answered from {OF_ALIGNED}: {', '.join(unaligned)}")
    if scaled := {without_indices(fqn): d.unaligned for fqn, d in decisions.items() if d.unaligned not in (None, 1.0)}:
        factor = next(iter(scaled.values()))
        sentences.append(f"times {factor:.2f}, as the tokens are no multiple of {TOKEN_TILE}: {', '.join(scaled)}")
    if differences := stale(table.software):
        sentences.append(
            f"the table was measured with {differences}; to measure again: fp8gate calibrate{table.variant.option}"
        )
    if table.incomplete:
        again = f"with the options that it was begun with: {completing_command(table, path)}"
        sentences.append(f"the table is incomplete, with {table.incomplete}; to complete it, {again}")
    if plans.chosen and not are_complete(plans.chosen.plans):
        again = completing_plan_command(plans.chosen.of_file, plans.chosen.source)
        sentences.append(f"the plan is incomplete, with {how_far(plans.chosen.plans)}; to complete it: {again}")
    sentences += [f"{remark}: {', '.join(names)}" for remark, names in notes.items() if names]
    return "; ".join(sentences)
