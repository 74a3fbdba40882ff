"""Turn the plan of one kind of layers into decisions for the linears of these layers. Pure.

In: the plan, and the linears of a model by name. Out: decisions, and findings if a block is not the one that was
measured. A plan was measured as a set of roles in one block, so it decides block by block: the speedup of a set is not
the sum of what its linears gain.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

from fp8gate.filter.contract.names import plain_name, without_indices
from fp8gate.filter.contract.plans.layer_names import LayerNames, whole_list
from fp8gate.filter.contract.plans.plan import Plan
from fp8gate.filter.contract.plans.planned_set import BlockLinears, PlannedSet, PlannedSets
from fp8gate.filter.contract.plans.role_names import RoleNames, Roles, is_fused, is_torn
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.decision.decide import Decision
from fp8gate.filter.policy.findings import Finding, PlanMismatchWarning

Decisions = Mapping[str, Decision]
Shapes = Mapping[str, LinearShape | None]


class _BlockDecision(NamedTuple):
    """What the plan decides for one block.

    planned: the set that the plan has for it. convert: the roles to convert, or None if the table decides. remark: what
    the measured speedup does not cover. mismatch: why it is not the block that was measured, for all such blocks.
    """

    planned: PlannedSet
    convert: Roles | None
    remark: str = ""
    mismatch: Finding | None = None


class KindDecisions:
    """Turns the plan of one kind of layers into decisions. layers: the list that these layers are in."""

    def __init__(self, plan: Plan, source: str, recomputes: Callable[[str], bool], *, is_found: bool) -> None:
        self._is_found = is_found
        self.plan, self.source, self.layers = plan, source, whole_list(plan.layers)
        self.layer_names = LayerNames(self.layers)
        self._names = RoleNames(plan.shapes, plan.layers)
        self._fitting: set[tuple[Roles, LinearShape, str]] = set()
        self._recomputes = recomputes
        self._by_block: dict[str, _BlockDecision] = {}
        self._blocks: tuple[int, dict[str, dict[str, Roles]]] = 0, {}
        self._sets = PlannedSets(plan)
        self._unchecked = _BlockDecision(self._sets.own, plan.convert, "as a whole, not checked")

    def has(self, fqn: str) -> bool:
        """Whether a linear is in one of these layers."""
        return self._names.place(fqn) is not None

    def has_roles(self, linears: Collection[str]) -> bool:
        return any(roles for block in self.blocks(linears).values() for roles in block.values())

    def has_measured(self, fqn: str, shape: LinearShape | None) -> bool:
        """Whether a linear of these layers is one that was measured."""
        place = self._names.place(fqn)
        return bool(place and place.roles and shape and not self._mismatch(fqn, place.roles, shape))

    def has_whole_blocks(self, linears: Collection[str], leaves_out: Callable[[str], bool]) -> bool:
        """Whether every block has all roles and a set, and the user leaves out those that the plan has left out."""
        for block in self.blocks(linears).values():
            if {role for roles in block.values() for role in roles} != self.plan.shapes.keys():
                return False
            left_out = (fqn for fqn, roles in block.items() if set(roles) & set(self.plan.left_out))
            if not all(map(leaves_out, left_out)):
                return False
            if any(is_torn(roles, self._sets.of(block).convert) for roles in block.values()):
                return False
        return True

    def forget(self) -> None:
        self._names.forget()
        self._by_block.clear()
        self._blocks = 0, {}

    def decide(self, fqn: str, shape: LinearShape) -> Decision | Finding | None:
        """See `ModelPlans.decide`."""
        place = self._names.place(fqn)
        if place is None or not place.roles:
            return self._unknown(fqn, in_block=place is not None)
        planned, convert, remark, mismatch = self._by_block.get(place.block, self._unchecked)
        if mismatch:
            return mismatch
        if difference := self._difference(fqn, place.roles, shape, planned):
            return self._finding(f"{difference}; the table decides")
        if convert is None:
            return None
        if len(place.roles) > 1 and is_fused(fqn):
            remark = ", ".join(filter(None, ("measured as several linears", remark)))
        suffix = f", {remark}" if remark else ""
        if place.roles[0] in convert:
            reason = f"{planned.name}: {self._gain(convert)}{suffix}"
            return Decision(convert=True, shape=shape, reason=reason, planned=True)
        reason = f"{planned.name}: bf16" + (suffix if place.roles[0] in planned.convert else "")
        return Decision(convert=False, shape=shape, reason=reason, planned=True)

    def decide_blocks(self, shapes: Shapes, stays: Callable[[str], bool]) -> None:
        """See `ModelPlans.decide_blocks`."""
        blocks = self.blocks(shapes)
        differences = {block: self._differences(linears, shapes) for block, linears in blocks.items()}
        counts = Counter(differences.values())
        for block, linears in blocks.items():
            planned = self._sets.of(linears)
            if difference := differences[block]:
                message = f"{difference}; the table decides {counts[difference]} of {len(blocks)} blocks"
                self._by_block[block] = _BlockDecision(planned, None, mismatch=self._finding(message))
            else:
                self._by_block[block] = self._decide_block(planned, linears, shapes, stays)

    def remarks(self) -> Iterator[str]:
        """See `ModelPlans.remarks`."""
        for planned, convert, *_ in self._by_block.values():
            if planned != self._sets.own and planned.convert == convert:
                yield f"{planned.name}: {self._gain(convert)}, in place of its own: {self._gain(self.plan.convert)}"

    def findings(self, decisions: Decisions) -> Iterator[Finding]:
        """The blocks that are not those that were measured, or convert another set than the plan's."""
        blocks = self.blocks(decisions)
        found: Counter[tuple[tuple[str, ...], Roles, bool]] = Counter()
        mismatches: dict[Finding, None] = {}
        for block, linears in blocks.items():
            if not any(decisions[fqn].planned or decisions[fqn].point for fqn in linears):
                continue
            if mismatch := self._by_block.get(block, self._unchecked).mismatch:
                mismatches[mismatch] = None
                continue
            differs = bool(self._differences(linears, {fqn: decisions[fqn].shape for fqn in linears}))
            found[self._converted_names(linears, decisions), self._sets.of(linears).convert, differs] += 1
        yield from mismatches
        for (names, expected, differs), count in found.items():
            if differs or names != expected:
                known = "in blocks that were not measured" if differs else self._measured(names)
                message = f"{count} of {len(blocks)} blocks convert {_listed(names)}, {known}"
                yield self._finding(f"$.convert: {message}; expected {_listed(expected)}")

    def _decide_block(
        self, planned: PlannedSet, linears: BlockLinears, shapes: Shapes, stays: Callable[[str], bool]
    ) -> _BlockDecision:
        present = {role for roles in linears.values() for role in roles}
        barred = {role for fqn, roles in linears.items() if shapes[fqn] is None or stays(fqn) for role in roles}
        left = tuple(role for role in planned.convert if role in present - barred)
        neighbours = "" if all(linears.values()) else "measured without the linears beside its own"
        if left == planned.convert:
            return _BlockDecision(planned, left, neighbours)
        measured = self.plan.candidate(left)
        if measured is None or measured.speedup_low is None:
            return _BlockDecision(planned, None)
        if self.plan.wins(measured.speedup_low):  # the plan's own set had to do so too
            return _BlockDecision(planned, left, ", ".join(filter(None, ("what is left of its set", neighbours))))
        return _BlockDecision(planned, (), f"what is left of its set, {_listed(left)}, {self._measured(left)}")

    def _differences(self, linears: BlockLinears, shapes: Shapes) -> str:
        """Why a block is not the one that the plan measured, so that no set of it was measured; "" if it is."""
        planned = self._sets.of(linears)
        found: dict[Roles, str] = {}
        for fqn, roles in linears.items():
            shape = shapes[fqn]
            if roles and shape and (difference := self._difference(fqn, roles, shape, planned)):
                found[roles] = difference
        others = [role for roles in list(found)[1:] for role in roles]
        return next(iter(found.values()), "") + (f"; different too: {_listed(others)}" if others else "")

    def _difference(self, fqn: str, roles: Roles, shape: LinearShape, planned: PlannedSet) -> str:
        """Why the plan cannot decide this linear, or ""."""
        return self._mismatch(fqn, roles, shape) or self._torn(fqn, roles, planned)

    def _mismatch(self, fqn: str, roles: Roles, shape: LinearShape) -> str:
        """Why this linear is not the one that the plan measured under its roles, or ""."""
        recompute = "full" if self._recomputes(plain_name(fqn)) else "none"
        if (roles, shape, recompute) in self._fitting:  # the layers of a model are alike
            return ""
        shapes = self.plan.shapes_of(roles, is_fused=is_fused(fqn)).items()
        compared = [(f"shapes.{role}", shape, measured) for role, measured in shapes]
        for field, actual, measured in (*compared, ("recompute", recompute, self.plan.recompute)):
            if actual != measured:
                return f"$.{field}: expected {actual}, as {without_indices(fqn)} is here; found {measured}"
        self._fitting.add((roles, shape, recompute))
        return ""

    def _torn(self, fqn: str, roles: Roles, planned: PlannedSet) -> str:
        """Why no set of the plan can decide a linear of several roles, or ""."""
        if not is_torn(roles, planned.convert):
            return ""
        expected = f"expected all or none of {_listed(roles)}, as {without_indices(fqn)} is all of them"
        found = _listed([role for role in roles if role in planned.convert])
        return f"$.convert: {expected}; found {found}"

    def _unknown(self, fqn: str, *, in_block: bool) -> Finding | None:
        """Why a linear without a role is not the plan's, if it could be mistaken for one of the plan's.

        That is so for a linear in a block, and for one elsewhere whose name ends with a role. It is not for a head.
        """
        role = self._names.alike(fqn)
        if not in_block and (role is None or self._is_found):
            return None
        layers = self.plan.layers or "(model.)layers.<i>"
        why = "is none of its roles" if in_block else f"is not named {layers}.{role}"
        return self._finding(f"$.shapes: {without_indices(fqn)} {why}; the table decides")

    def blocks(self, linears: Collection[str]) -> dict[str, dict[str, Roles]]:
        """block -> its linears, of all linears of a model by name, which only grow until `forget`."""
        if self._blocks[0] != len(linears):
            blocks: defaultdict[str, dict[str, Roles]] = defaultdict(dict)
            for fqn in linears:
                if place := self._names.place(fqn):
                    blocks[place.block][fqn] = place.roles
            self._blocks = len(linears), blocks
        return self._blocks[1]

    def _converted_names(self, linears: BlockLinears, decisions: Decisions) -> tuple[str, ...]:
        """What a block converts: roles in the plan's order, then the names of linears that the plan does not know."""
        roles = {role for fqn, roles in linears.items() if decisions[fqn].convert for role in roles}
        unknown = {without_indices(fqn): None for fqn in linears if decisions[fqn].convert and not linears[fqn]}
        return (*(role for role in self.plan.shapes if role in roles), *unknown)

    def _gain(self, roles: Roles) -> str:
        if not roles:
            return "bf16"
        candidate = self.plan.candidate(roles)
        assert candidate is not None, "a block converts only a set that is one of the plan's candidates"
        assert candidate.speedup is not None, "and that was measured"
        return f"block {candidate.speedup:.3f}x"

    def _measured(self, names: tuple[str, ...]) -> str:
        candidate = self.plan.candidate(names)
        speedup = candidate.speedup if candidate else None
        return "which was not measured" if speedup is None else f"measured at {speedup:.3f}x"

    def _finding(self, message: str) -> Finding:
        return mismatch_finding(self.source, message)


def mismatch_finding(source: str, message: str) -> Finding:
    return Finding(PlanMismatchWarning, f"{source}: {message}")


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names) or "nothing"
