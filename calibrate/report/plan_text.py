"""A plan as text for people and as JSON for programs. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from fp8gate.filter.contract.plans.plan import Candidate, Plan
from fp8gate.filter.contract.plans.role_names import Roles
from fp8gate.filter.terminal_table import Align, render_table

MAX_CANDIDATES = 8  # how many more are shown beside the choices; the file has all of them


def plan_json(plan: Plan) -> dict[str, Any]:
    """The content of the file, and the speedup of each choice."""
    data: dict[str, Any] = msgspec.to_builtins(plan)
    data["candidates"] = [dict(zip(plan.columns, row, strict=True)) for row in data.pop("candidates")]
    speedups = {name: None if candidate is None else candidate.speedup for name, candidate in choices(plan).items()}
    return {**data, "speedup": speedups}


def plan_text(plan: Plan) -> str:
    """Say what the plan converts, what each choice is worth, and which other sets were the best of those measured."""
    software = plan.software
    title = [
        " ".join(filter(None, (plan.model, plan.layers))),
        f"{plan.tokens} tokens",
        *([f"tp {plan.tp}"] if plan.tp > 1 else []),
        str(plan.variant),
    ]
    title += ["recomputed"] if plan.recompute == "full" else []
    title += [name for name, is_on in plan.protocol.inductor.items() if is_on]
    named = choices(plan)
    others = [candidate for candidate in plan.candidates if candidate not in named.values()][:MAX_CANDIDATES]
    rows = [_row(name, candidate) for name, candidate in named.items()]
    rows += [_row("", candidate) for candidate in others]
    headers = ("choice", "float8", "block ms", "speedup", "low", "high", "by the table", "visits")
    align: tuple[Align, ...] = ("left", "left", *("right",) * 6)
    parts = [
        f"{', '.join(title)}, {plan.device.name} "
        f"(torch {software.torch}, torchao {software.torchao}, measured {plan.measured_at:%Y-%m-%d})",
        render_table(headers, rows, align=align),
        f"{len(plan.candidates)} sets measured; float8: {', '.join(plan.convert) or 'none'}",
    ]
    if plan.left_out:
        parts.append(f"left in bf16 as asked: {', '.join(plan.left_out)}")
    if plan.indivisible:
        parts.append(f"no multiples of 16, left in bf16: {', '.join(plan.indivisible)}")
    if plan.left_alone:
        parts.append(f"no linears, left in bf16: {', '.join(plan.left_alone)}")
    return "\n\n".join(parts)


def choices(plan: Plan) -> dict[str, Candidate | None]:
    """What a user may convert: nothing, everything, what torchao's rule or the table says, or what the plan says.

    None if there is no such answer, or if the plan did not measure that set.
    """
    everything = plan.possible
    sets: dict[str, Roles | None] = {
        "bf16": (),
        "all float8": everything,
        "torchao's rule": plan.torchao,
        "table": plan.table.convert if plan.table else None,
        "plan": plan.convert,
    }
    return {name: None if convert is None else plan.candidate(convert) for name, convert in sets.items()}


def _row(name: str, candidate: Candidate | None) -> tuple[str, ...]:
    if candidate is None:
        return name, "no answer", "", "", "", "", "", ""
    roles = ", ".join(role.rpartition(".")[2] for role in candidate.convert) or "none"
    if candidate.speedup is None:
        return name, roles, candidate.status, "", "", "", "", ""
    ms = ((candidate.fwd_us or 0.0) + (candidate.bwd_us or 0.0)) / 1e3
    ratios = (candidate.speedup, candidate.speedup_low, candidate.speedup_high, candidate.predicted)
    shown = ("" if ratio is None else f"{ratio:.3f}x" for ratio in ratios)
    return name, roles, f"{ms:.3f}", *shown, str(candidate.visits)
