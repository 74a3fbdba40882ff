"""What each choice of float8 layers gains inside a model's block, and how well a table alone chooses there.

The packaged plans have measured the choices in the compiled block. The set that a rule chooses is looked up among the
candidates of the plan: the filter's default, one min_speedup for all linears, torchao's rule.

gain: the block's time in bf16 over its time with the choice, forward and backward, minus 1.
loss: by how much the block is slower with the choice than with the plan's.

Run it: python benchmarks/plan_choices.py [--device "NVIDIA H200"]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from statistics import fmean

from tabulate import tabulate

from fp8gate.filter.contract.devices import device_slug
from fp8gate.filter.contract.plans.plan import PLANS, Plan
from fp8gate.filter.contract.plans.plan_file import read_plans
from fp8gate.filter.contract.plans.role_names import Roles
from fp8gate.filter.decision.lookup import Lookup
from fp8gate.filter.decision.shared_input import decide_linear, input_kind
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
    return (plan for path in sorted(folder.glob("*.yaml"), key=attrgetter("stem")) for plan in read_plans(path))


def gains(plans: list[Plan]) -> str:
    """The gain of each choice in the block of each plan, as a Markdown table."""
    rows = []
    for plan in plans:
        sets = (plan.possible, plan.torchao, table_choice(plan), plan.convert)
        cells = ["" if roles is None else gain(plan, roles) for roles in sets]
        names = ", ".join(role.rpartition(".")[2] for role in plan.convert)
        measured = sum(candidate.visits > 0 for candidate in plan.candidates)
        rows.append((label(plan), str(plan.variant), bf16_ms(plan), *cells, names, measured))
    headers = ("block", "recipe", "bf16 ms", "all float8", "torchao's rule", "table", "plan", "the plan's", "measured")
    return tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")


def losses(plans: list[Plan]) -> str:
    """How much each rule's choice loses against each complete plan, as a Markdown table."""
    plans = [plan for plan in plans if not plan.incomplete]
    rules: dict[str, Callable[[Plan], Roles | None]] = {"the filter's default": table_choice}
    rules |= {f"{least:.2f} for all": partial(table_choice, min_speedup=least) for least in MIN_SPEEDUPS}
    rules["torchao's rule"] = lambda plan: plan.torchao
    rows = []
    for name, choose in rules.items():
        found = [None if (roles := choose(plan)) is None else loss(plan, roles) for plan in plans]
        cells = ["not measured" if lost is None else f"{lost:.1%}" for lost in found]
        known = [lost for lost in found if lost is not None]
        rows.append((name, *cells, f"{fmean(known):.1%}", f"{max(known):.1%}"))
    headers = ("rule", *(f"{label(plan)}, {plan.variant}" for plan in plans), "mean", "worst")
    return tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")


def label(plan: Plan) -> str:
    """The model, which of its layers if it has several kinds, the degree, and what else sets the plan apart."""
    stack, _, indices = plan.layers.rpartition(".")
    first, _, others = indices.partition(",")
    which = f" layers {first}{',...' if others else ''}" if stack and indices != "*" else ""
    degree = f" TP {plan.tp}" if plan.tp > 1 else ""
    recomputed = ", recomputed" if plan.recompute == "full" else ""
    return f"{plan.model}{which}{degree}{recomputed}" + (", incomplete" if plan.incomplete else "")


def table_choice(plan: Plan, min_speedup: float | None = None) -> Roles:
    """The roles that the packaged table converts. min_speedup: for all linears; None: the filter's default."""
    table, _ = find_table(plan.recipe, casts=plan.protocol.casts, device=plan.device.name)
    lookup, recomputed = Lookup(table), plan.recompute == "full"
    decisions = {
        role: decide_linear(input_kind(role), plan.shape(role), lookup, min_speedup=min_speedup, recomputed=recomputed)
        for role in plan.shapes
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
