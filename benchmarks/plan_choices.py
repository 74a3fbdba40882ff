"""What each choice of float8 layers gains inside a model's block, and how well a table alone chooses there.

The packaged plans have measured the choices in the compiled block. The set that the table chooses at a min_speedup is
looked up among the candidates of the plan.

gain: the block's time in bf16 over its time with the choice, forward and backward, minus 1.
loss: by how much the block is slower with the choice than with the plan's.

Run it: python benchmarks/plan_choices.py [--device "NVIDIA H200"]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from statistics import fmean

from tabulate import tabulate

from fp8gate.filter.contract.devices import device_slug
from fp8gate.filter.contract.plan import PLANS, Plan, read_plan
from fp8gate.filter.contract.role_names import Roles
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP, decide
from fp8gate.filter.decision.lookup import Lookup
from fp8gate.filter.locate.find_table import find_table
from fp8gate.filter.locate.places import packaged_thresholds

MIN_SPEEDUPS = (1.0, 1.02, 1.03, 1.05, 1.1, 1.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="NVIDIA H200", help="a device with packaged tables and plans")
    plans = list(packaged_plans(parser.parse_args().device))
    print(gains(plans), losses(plans), sep="\n\n")


def packaged_plans(device: str) -> Iterator[Plan]:
    folder = packaged_thresholds() / device_slug(device) / PLANS
    return (read_plan(path) for path in sorted(folder.glob("*.yaml")))


def gains(plans: list[Plan]) -> str:
    """The gain of each choice in the block of each plan, as a Markdown table."""
    rows = []
    for plan in plans:
        sets = (plan.possible, plan.torchao, table_choice(plan, DEFAULT_MIN_SPEEDUP), plan.convert)
        cells = ["" if roles is None else gain(plan, roles) for roles in sets]
        names = ", ".join(role.rpartition(".")[2] for role in plan.convert)
        tp = f" TP {plan.tp}" if plan.tp > 1 else ""
        measured = sum(candidate.visits > 0 for candidate in plan.candidates)
        rows.append((plan.model + tp, plan.recipe, bf16_ms(plan), *cells, names, measured))
    headers = ("block", "recipe", "bf16 ms", "all float8", "torchao's rule", "table", "plan", "the plan's", "measured")
    return tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")


def losses(plans: list[Plan]) -> str:
    """How much the table's choice loses against each plan at each min_speedup, as a Markdown table."""
    rows = []
    for min_speedup in MIN_SPEEDUPS:
        found = [loss(plan, table_choice(plan, min_speedup)) for plan in plans]
        cells = ["not measured" if lost is None else f"{lost:.1%}" for lost in found]
        known = [lost for lost in found if lost is not None]
        rows.append((f"{min_speedup:.2f}", *cells, f"{fmean(known):.1%}", f"{max(known):.1%}"))
    headers = ("min_speedup", *(f"{plan.model}, {plan.recipe}" for plan in plans), "mean", "worst")
    return tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")


def table_choice(plan: Plan, min_speedup: float) -> Roles:
    """The roles that the packaged table converts."""
    table, _ = find_table(plan.recipe, device=plan.device.name)
    lookup, recomputed = Lookup(table), plan.recompute == "full"
    decisions = {
        role: decide(plan.shape(role), lookup, min_speedup=min_speedup, recomputed=recomputed) for role in plan.shapes
    }
    return tuple(role for role, decision in decisions.items() if decision.convert)


def loss(plan: Plan, roles: Roles) -> float | None:
    """None if the plan has not measured this set."""
    candidate = plan.candidate(roles)
    if candidate is None or candidate.speedup is None or plan.chosen.speedup is None:
        return None
    return plan.chosen.speedup / candidate.speedup - 1


def gain(plan: Plan, roles: Roles) -> str:
    """The gain, with the number of visits behind it: the fewer there are, the less it is worth."""
    candidate = plan.candidate(roles)
    if candidate is None or candidate.speedup is None:
        return "not measured"
    return f"{candidate.speedup - 1:+.1%} ({candidate.visits})" if roles else "none converted"


def bf16_ms(plan: Plan) -> str:
    bf16 = plan.candidate(())
    assert bf16, "a plan has bf16"
    return f"{((bf16.fwd_us or 0.0) + (bf16.bwd_us or 0.0)) / 1e3:.2f}"


if __name__ == "__main__":
    main()
