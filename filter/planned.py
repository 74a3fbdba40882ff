"""A plan in use: what it decides of a model's linears, and whether its set is what every block converts. Pure.

In: a plan, linears by name. Out: decisions, and findings where blocks convert another set than the one measured to win:
what conversions are worth together is not the sum of their parts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from fp8gate.filter.decision import Decision
from fp8gate.filter.findings import Finding, PlanMismatchWarning
from fp8gate.filter.linear_layer import role as without_indices
from fp8gate.filter.plan import Plan, Roles
from fp8gate.filter.shapes import LinearShape


class Planned:
    """A plan, and what to call it in messages."""

    def __init__(self, plan: Plan, source: str) -> None:
        self.plan, self.source = plan, source

    def decide(self, fqn: str, shape: LinearShape, recomputed: bool) -> Decision | Finding | None:
        """The plan's answer; a finding for another layer than it was made for, which is not in it; None: not in it."""
        role = self.plan.role(fqn)
        if role is None:
            return None
        for field, here, there in (
            (f"shapes.{role}", shape, self.plan.shape(role)),
            ("recompute", "full" if recomputed else "none", self.plan.recompute),
        ):
            if here != there:
                which = f"expected {here}, as {without_indices(fqn)} is here; found {there}"
                return self._finding(f"$.{field}: {which}; the table decides")
        if role not in self.plan.convert:
            return Decision(convert=False, shape=shape, reason="the plan: bf16")
        together = f", {len(self.plan.convert)} roles together" if len(self.plan.convert) > 1 else ""
        reason = f"the plan: block {self.plan.chosen.speedup:.3f}x{together}"
        return Decision(convert=True, shape=shape, reason=reason)

    def findings(self, decisions: Mapping[str, Decision]) -> Iterator[Finding]:
        """Where blocks convert another set than the plan's, none is of it, or several kinds of blocks are."""
        converted: defaultdict[str, set[str]] = defaultdict(set)
        for fqn, decision in decisions.items():
            if place := self.plan.place(fqn):
                block, role = place
                converted[block].update({role} if decision.convert else ())
        if not converted:
            yield self._finding(f"$.shapes: no linear has any of its roles, such as {next(iter(self.plan.shapes))}")
        if len(kinds := dict.fromkeys(map(without_indices, converted))) > 1:
            yield self._finding(f"$.model: expected one kind of block; its roles are in {', '.join(kinds)}")
        sets = Counter(tuple(role for role in self.plan.shapes if role in roles) for roles in converted.values())
        for found, count in sets.items():
            if found and found != self.plan.convert:
                yield self._finding(f"$.convert: {count} of {len(converted)} blocks convert {self._measured(found)}")

    def _measured(self, roles: Roles) -> str:
        candidate = self.plan.candidate(roles)
        number = candidate.speedup if candidate else None
        known = "which was not measured" if number is None else f"measured at {number:.3f}x"
        return f"{', '.join(roles)}, {known}, not {', '.join(self.plan.convert) or 'nothing'}"

    def _finding(self, message: str) -> Finding:
        return Finding(PlanMismatchWarning, f"{self.source}: {message}")
