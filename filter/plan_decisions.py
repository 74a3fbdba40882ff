"""A plan in use: what it decides of a model's linears. Its unit is the set that was measured, block by block. Pure.

In: a plan, linears by name. Out: decisions, and findings where a model is not what was measured: what conversions are
worth together is not the sum of their parts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from fp8gate.filter.contract.names import plain_name, without_indices
from fp8gate.filter.contract.plan import Plan, Roles, exceeds_control
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.decision.decide import Decision
from fp8gate.filter.findings import Finding, PlanMismatchWarning

Decisions = Mapping[str, Decision]
Recomputes = Callable[[str], bool]


class _Ruling(NamedTuple):
    """The roles that a block converts, None: the table decides; and what the block's number does not say."""

    convert: Roles | None
    remark: str = ""


class PlanDecisions:
    """A plan, what to call it in messages, and what it comes to in the blocks of a model once `rule` has seen them."""

    def __init__(self, plan: Plan, source: str) -> None:
        self.plan, self.source = plan, source
        self._rulings: dict[str, _Ruling] = {}
        self._unchecked = _Ruling(plan.convert, "as a whole, not checked")

    def forget(self) -> None:
        """Start anew with another model."""
        self._rulings.clear()

    def decide(self, fqn: str, shape: LinearShape, recomputed: bool) -> Decision | Finding | None:
        """The plan's answer; a finding for what could be taken for its linear and is not; None: the table decides."""
        place = self.plan.place(fqn)
        if place is None or not place.roles:
            return self._unknown(fqn, in_block=place is not None)
        if mismatch := self._mismatch(fqn, place.roles, shape, recomputed):
            return mismatch
        convert, remark = self._rulings.get(place.block, self._unchecked)
        if convert is None:
            return None
        says = f", {remark}" if remark else ""
        if place.roles[0] in convert:
            reason = f"the plan: block {self._speedup(convert):.3f}x{says}"
            return Decision(convert=True, shape=shape, reason=reason, planned=True)
        reason = "the plan: bf16" + (says if place.roles[0] in self.plan.convert else "")
        return Decision(convert=False, shape=shape, reason=reason, planned=True)

    def rule(self, decisions: Decisions, recomputes: Recomputes) -> None:
        """Settle what each block converts, from all of a model's answers, each given as if its block were whole."""
        for block, linears in self._blocks(decisions).items():
            self._rulings[block] = self._ruling(linears, decisions, recomputes)

    def findings(self, decisions: Decisions, recomputes: Recomputes) -> Iterator[Finding]:
        """Where blocks convert another set than the plan's, or none is of it; not where one is left out altogether."""
        blocks = self._blocks(decisions)
        if not any(roles for linears in blocks.values() for roles in linears.values()):
            yield self._finding(f"$.shapes: no linear has any of its roles, such as {next(iter(self.plan.shapes))}")
        sets: Counter[tuple[Roles, bool]] = Counter()
        for linears in blocks.values():
            if any(decisions[fqn].planned or decisions[fqn].point for fqn in linears):
                sets[self._converted(linears, decisions), self._is_other(linears, decisions, recomputes)] += 1
        for (found, is_other), count in sets.items():
            if is_other or found != self.plan.convert:
                known = "in blocks that were not measured" if is_other else self._measured(found)
                which = f"{count} of {len(blocks)} blocks convert {_names(found)}, {known}"
                yield self._finding(f"$.convert: {which}; expected {_names(self.plan.convert)}")

    def _ruling(self, linears: Mapping[str, Roles], decisions: Decisions, recomputes: Recomputes) -> _Ruling:
        if self._is_other(linears, decisions, recomputes):
            return _Ruling(None)
        there = {role for roles in linears.values() for role in roles}
        barred = {role for fqn, roles in linears.items() if not decisions[fqn].planned for role in roles}
        left = tuple(role for role in self.plan.convert if role in there - barred)
        beside = "" if all(linears.values()) else "measured without the linears beside its own"
        if left == self.plan.convert:
            return _Ruling(left, beside)
        measured = self.plan.candidate(left)
        if measured is None or measured.speedup_low is None:
            return _Ruling(None)
        if exceeds_control(measured.speedup_low, self.plan.control):  # as is asked of the plan's own set
            return _Ruling(left, ", ".join(filter(None, ("what is left of its set", beside))))
        return _Ruling((), f"what is left of its set, {_names(left)}, {self._measured(left)}")

    def _mismatch(self, fqn: str, roles: Roles, shape: LinearShape, recomputed: bool) -> Finding | None:
        """Why this is another layer than the plan's."""
        recompute = "full" if recomputed else "none"
        fields = [(f"shapes.{role}", shape, self.plan.shape(role)) for role in roles]
        for field, here, there in (*fields, ("recompute", recompute, self.plan.recompute)):
            if here != there:
                which = f"expected {here}, as {without_indices(fqn)} is here; found {there}"
                return self._finding(f"$.{field}: {which}; the table decides")
        apart = [role for role in roles if role in self.plan.convert]
        if apart and len(apart) < len(roles):
            which = f"expected all or none of {_names(roles)}, as {without_indices(fqn)} is both; found {_names(apart)}"
            return self._finding(f"$.convert: {which}; the table decides")
        return None

    def _unknown(self, fqn: str, *, in_block: bool) -> Finding | None:
        """A linear within a block, or one named like a role elsewhere, may be taken for the plan's; a head may not."""
        alike = self.plan.alike(fqn)
        if not in_block and alike is None:
            return None
        why = "is none of its roles" if in_block else f"is not named (model.)layers.<i>.{alike}"
        return self._finding(f"$.shapes: {without_indices(fqn)} {why}; the table decides")

    def _is_other(self, linears: Mapping[str, Roles], decisions: Decisions, recomputes: Recomputes) -> bool:
        """Whether one of a block's linears is another than the plan's: then no set of the block was measured."""
        for fqn, roles in linears.items():
            shape = decisions[fqn].shape
            if roles and shape and self._mismatch(fqn, roles, shape, recomputes(plain_name(fqn))):
                return True
        return False

    def _blocks(self, decisions: Decisions) -> dict[str, dict[str, Roles]]:
        """Block -> its linears, each with its roles: none of those that the plan does not know."""
        blocks: defaultdict[str, dict[str, Roles]] = defaultdict(dict)
        for fqn in decisions:
            if place := self.plan.place(fqn):
                blocks[place.block][fqn] = place.roles
        return blocks

    def _converted(self, linears: Mapping[str, Roles], decisions: Decisions) -> Roles:
        """What a block converts: roles in the plan's order, then names that are none."""
        roles = {role for fqn, roles in linears.items() if decisions[fqn].convert for role in roles}
        others = {without_indices(fqn): None for fqn in linears if decisions[fqn].convert and not linears[fqn]}
        return (*(role for role in self.plan.shapes if role in roles), *others)

    def _speedup(self, roles: Roles) -> float:
        candidate = self.plan.candidate(roles)
        assert candidate is not None, "a ruling names a set of the plan's"
        assert candidate.speedup is not None, "that was measured"
        return candidate.speedup

    def _measured(self, roles: Roles) -> str:
        candidate = self.plan.candidate(roles)
        number = candidate.speedup if candidate else None
        return "which was not measured" if number is None else f"measured at {number:.3f}x"

    def _finding(self, message: str) -> Finding:
        return Finding(PlanMismatchWarning, f"{self.source}: {message}")


def _names(roles: Roles | list[str]) -> str:
    return ", ".join(roles) or "nothing"
