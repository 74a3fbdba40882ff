"""The set of roles that a plan has for a block: its own, or another where one linear holds several roles. Pure.

In: a plan, and the roles of a block's linears. Out: a `PlannedSet`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import NamedTuple

from fp8gate.filter.contract.names import plain_name
from fp8gate.filter.contract.plans.fastest_set import MeasuredSet, fastest
from fp8gate.filter.contract.plans.plan import Plan
from fp8gate.filter.contract.plans.role_names import Roles, is_torn

BlockLinears = Mapping[str, Roles]
"""The linears of one block: fqn -> its roles, empty for a linear that the plan does not know."""


class PlannedSet(NamedTuple):
    """convert: the roles. name: what reasons call it."""

    convert: Roles
    name: str = "the plan"


class PlannedSets:
    """Finds the set for each block of a model. own: the set that the plan chose."""

    def __init__(self, plan: Plan) -> None:
        self.own = PlannedSet(plan.convert)
        self._plan = plan
        self._with = cache(self._find)

    def of(self, linears: BlockLinears) -> PlannedSet:
        """The plan's own set, unless it has some of one linear's roles and not all.

        Then it is the fastest measured set that has all or none of them, which may be bf16. If none was measured, it is
        the plan's own, and the block is not the plan's to decide.
        """
        several = ((plain_name(fqn).rpartition(".")[2], roles) for fqn, roles in linears.items() if len(roles) > 1)
        return self._with(frozenset(several))

    def _find(self, together: frozenset[tuple[str, Roles]]) -> PlannedSet:
        """together: the last part of the name, and the roles, of each linear that has several."""
        torn = sorted({name for name, roles in together if is_torn(roles, self._plan.convert)})
        whole = _fastest_whole(self._plan, [roles for _, roles in together]) if torn else None
        if whole is None:
            return self.own
        return PlannedSet(whole, f"the plan's fastest measured set with {' and '.join(torn)} whole")


def _fastest_whole(plan: Plan, together: Collection[Roles]) -> Roles | None:
    """By the rule of the search. None if no other set than bf16 was measured that tears none of these apart."""
    screening, visits = plan.protocol.screening, plan.protocol.screening + plan.protocol.final
    whole = [
        MeasuredSet(one.convert, one.speedup, one.speedup_low, one.visits >= visits, one.visits >= screening)
        for one in plan.candidates
        if one.convert
        and one.speedup
        and one.speedup_low
        and not any(is_torn(roles, one.convert) for roles in together)
    ]
    if not whole:
        return None
    best = fastest(whole, noise=plan.protocol.noise)
    return tuple(best.convert) if plan.wins(best.speedup_low) else ()
