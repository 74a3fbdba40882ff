"""A plan as text for people and as JSON for programs. Pure."""

from __future__ import annotations

from typing import Any

import msgspec
from tabulate import tabulate

from fp8gate.filter.contract.plan import Candidate, Plan, Roles

MAX_CANDIDATES = 8  # beside the four choices; the file has all


def plan_json(plan: Plan) -> dict[str, Any]:
    """The file's content, and what each choice gains."""
    data: dict[str, Any] = msgspec.to_builtins(plan)
    data["candidates"] = [dict(zip(plan.columns, row, strict=True)) for row in data.pop("candidates")]
    speedups = {name: None if one is None else one.speedup for name, one in choices(plan).items()}
    return {**data, "speedup": speedups}


def plan_text(plan: Plan) -> str:
    """What the plan converts, what each choice is worth, and the best of what else was measured."""
    software = plan.software
    title = [plan.model, f"{plan.tokens} tokens", *([f"tp {plan.tp}"] if plan.tp > 1 else []), plan.recipe]
    title += ["recomputed"] if plan.recompute == "full" else []
    title += [name for name, is_on in plan.protocol.inductor.items() if is_on]
    named = choices(plan)
    others = [one for one in plan.candidates if one not in named.values()][:MAX_CANDIDATES]
    rows = [_row(name, one) for name, one in named.items()] + [_row("", one) for one in others]
    headers = ("choice", "float8", "block ms", "speedup", "low", "high", "by the table", "visits")
    align = ("left", "left", *["right"] * 6)
    parts = [
        f"{', '.join(title)}, {plan.device.name} "
        f"(torch {software.torch}, torchao {software.torchao}, measured {plan.measured_at:%Y-%m-%d})",
        tabulate(rows, headers=headers, disable_numparse=True, colalign=align),
        f"{len(plan.candidates)} sets measured; float8: {', '.join(plan.convert) or 'none'}",
    ]
    if plan.indivisible:
        parts.append(f"no multiples of 16, left in bf16: {', '.join(plan.indivisible)}")
    if plan.left_alone:
        parts.append(f"no linears, left in bf16: {', '.join(plan.left_alone)}")
    return "\n\n".join(parts)


def choices(plan: Plan) -> dict[str, Candidate | None]:
    """What a user may do: nothing, everything, what torchao's rule or the table says, or the plan. None: no such."""
    everything = tuple(role for role in plan.shapes if role not in plan.indivisible)
    sets: dict[str, Roles | None] = {
        "bf16": (),
        "all float8": everything,
        "torchao's rule": plan.torchao,
        "table": plan.table.convert if plan.table else None,
        "plan": plan.convert,
    }
    return {name: None if convert is None else plan.candidate(convert) for name, convert in sets.items()}


def _row(name: str, one: Candidate | None) -> tuple[str, ...]:
    if one is None:
        return name, "no answer", "", "", "", "", "", ""
    names = ", ".join(role.rpartition(".")[2] for role in one.convert) or "none"
    if one.speedup is None:
        return name, names, one.status, "", "", "", "", ""
    ms = ((one.fwd_us or 0.0) + (one.bwd_us or 0.0)) / 1e3
    ratios = (one.speedup, one.speedup_low, one.speedup_high, one.predicted)
    return name, names, f"{ms:.3f}", *("" if ratio is None else f"{ratio:.3f}x" for ratio in ratios), str(one.visits)
