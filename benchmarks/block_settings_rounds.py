"""Rounds of visits to sets of float8 linears under settings, bf16 and production's settings in each round.

In: a pool, a journal. Out: visits, each as soon as it is done, in the journal. A set that is compared with another has
been visited in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from block_settings_bench import SettingsPool, settings_in
from block_settings_list import AGAIN, KnownSettings
from block_settings_output import SettingsJournal, describe, production_of

from fp8gate.calibrate.planning.block_worker_pool import StoppedError
from fp8gate.calibrate.planning.search import BF16_SET, RoleSet
from fp8gate.calibrate.planning.visit_rounds import VisitRounds


class SettingRounds(VisitRounds):
    """Measures sets of roles, each under its settings."""

    pool: SettingsPool
    journal: SettingsJournal

    def __init__(
        self,
        pool: SettingsPool,
        journal: SettingsJournal,
        roles: Iterable[str],
        known: KnownSettings,
        say: Callable[[str], None],
        *,
        start: float,
        until: float,
    ) -> None:
        self._asked: Sequence[RoleSet] = ()
        super().__init__(pool, journal, [*roles, AGAIN, *known.names], say, start=start, until=until)

    def __call__(self, candidates: Sequence[RoleSet], visits: int) -> dict[RoleSet, tuple[float, ...]]:
        """Until each candidate was visited so often beside bf16 and production. Raises as a plan's rounds do."""
        self._asked = list(dict.fromkeys([*map(production_of, candidates), *candidates]))
        for one in {*map(production_of, candidates)} & self.failed.keys():
            self.say(f"{self._name(one)} could not be measured, so nothing is compared with it")
        return super().__call__(self._asked, visits)

    def pairs(self, one: RoleSet) -> int:
        """In how many rounds it was visited beside bf16 and production."""
        visits, production = self._visits[one], self._visits[production_of(one)]
        return sum(at in production and at in self._visits[BF16_SET] for at in visits)

    def _lacks(self, one: RoleSet, visits: int) -> bool:
        """Production lacks a visit as long as a set does that is compared with it."""
        compared = [other for other in self._asked if production_of(other) == one]
        return self._lacks_itself(one, visits) or any(self._lacks_itself(other, visits) for other in compared)

    def _lacks_itself(self, one: RoleSet, visits: int) -> bool:
        return not {one, production_of(one)} & self.failed.keys() and self.pairs(one) < visits

    def _count(self, candidates: Sequence[RoleSet], visits: int) -> int:
        lacking = {one: visits - self.pairs(one) for one in candidates if self._lacks_itself(one, visits)}
        rounds = max(lacking.values(), default=0)
        references = {BF16_SET, *map(production_of, lacking)}
        return sum(count for one, count in lacking.items() if one not in references) + rounds * len(references)

    def _keep(self, one: RoleSet, **fields: object) -> None:
        super()._keep(one, **fields, **(self.pool.cost(one) if "fwd_us" in fields else {}))
        if one in self.failed and not settings_in(one) and AGAIN not in one:
            raise StoppedError(f"{self._name(one)} could not be measured, so nothing can be compared with it")

    def _name(self, one: RoleSet) -> str:
        return describe(one, self.journal.setup)


def variants_of(sets: Mapping[str, Sequence[str]], extras: Iterable[Sequence[str]]) -> list[RoleSet]:
    """Each set of roles with each of these: settings, or AGAIN, or nothing."""
    return [frozenset((*roles, *extra)) for extra in extras for roles in sets.values()]
