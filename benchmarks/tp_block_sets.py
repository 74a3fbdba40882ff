"""The sets of linears that benchmarks/tp_block.py measures: the plan's finalists, and what others would convert.

In: a `Subject` as one rank holds it, a table's answer, a plan. Out: a `ConvertedSet` for each, with the plan's numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from tp_block_output import CONTROL, PLAN, ConvertedSet

from fp8gate.calibrate.planning.subject import Subject
from fp8gate.calibrate.planning.table_answer import TableAnswer
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.plans.plan import Candidate, Plan
from fp8gate.filter.contract.plans.plan_file import read_plan
from fp8gate.filter.contract.recipes import Casts, Variant

MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def plan_of(path: Path | None, subject: Subject, variant: Variant) -> Plan | None:
    """Raises InputError for a plan of another model, recipe or casts, or of roles that cannot be float8 here."""
    if path is None:
        return None
    plan = read_plan(path)
    for name, found, expected in (
        ("model", plan.model, subject.name),
        ("recipe", plan.recipe, variant.recipe),
        ("protocol.casts", plan.protocol.casts, variant.casts),
    ):
        if found != expected:
            raise InputError(f"{path}: $.{name}: expected {expected}, found {found}")
    if unknown := {role for one in finalists(plan) for role in one.convert} - {*subject.possible}:
        raise InputError(f"{path}: expected roles that float8 can compute here; found {sorted(unknown)}")
    return plan


def finalists(plan: Plan) -> list[Candidate]:
    """The sets that the plan visited most, the fastest first. Its choice is one of them, unless that is bf16."""
    measured = [one for one in plan.candidates if one.convert and one.status == "measured"]
    most = max((one.visits for one in measured), default=0)
    return sorted((one for one in measured if one.visits == most), key=lambda one: -(one.speedup or 0.0))


def make_sets(
    possible: Sequence[str], answer: TableAnswer, plan: Plan | None, casts: Casts, say: Callable[[str], None]
) -> tuple[ConvertedSet, ...]:
    """The sets to measure, bf16 first and bf16 again last. Choices that convert the same roles are one set.

    With fp8gate's casts, what the plan converts, or the table, or else all, is measured with Inductor's too.
    """
    chosen: dict[frozenset[str], list[str]] = defaultdict(list)
    chosen[frozenset()].append("bf16")
    chosen[frozenset(possible)].append("all")
    if answer.torchao is None:
        say("torchao's rule: none for this recipe, left out")
    else:
        chosen[frozenset(answer.torchao)].append("torchao's rule")
    if answer.table is not None:
        chosen[frozenset(answer.table.convert)].append("table")
    if plan is None:
        chosen[frozenset(MLP) & frozenset(possible)].append("w1 w2 w3")
    else:
        chosen[frozenset(plan.convert)].append(PLAN)
        for i, one in enumerate(finalists(plan), start=1):
            if frozenset(one.convert) not in chosen:
                chosen[frozenset(one.convert)].append(f"finalist {i}")
    sets = [
        ConvertedSet(
            name=", ".join(names),
            convert=tuple(role for role in possible if role in roles),
            casts=casts if roles else "inductor",
            plan=_planned(plan, roles),
        )
        for roles, names in chosen.items()
    ]
    if casts != "inductor":
        sets += [_with_inductors_casts(sets)]
    return (*sets, ConvertedSet(name=CONTROL, convert=()))


def _with_inductors_casts(sets: Sequence[ConvertedSet]) -> ConvertedSet:
    """The set of the plan, else of the table, else of all, of those that convert something."""
    by_choice = {choice: one for one in sets if one.convert for choice in one.name.split(", ")}
    same = next(by_choice[choice] for choice in (PLAN, "table", "all") if choice in by_choice)
    return ConvertedSet(name=f"{same.name}; Inductor's casts", convert=same.convert)


def _planned(plan: Plan | None, roles: frozenset[str]) -> tuple[float, float, float] | None:
    """The plan's speedup of a set, with bounds; None if the plan did not measure it."""
    found = [one for one in plan.candidates if frozenset(one.convert) == roles] if plan else []
    if not found or found[0].speedup is None or found[0].speedup_low is None or found[0].speedup_high is None:
        return None
    return found[0].speedup, found[0].speedup_low, found[0].speedup_high
