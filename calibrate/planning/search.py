"""Search the set of roles that trains a block fastest, with few measurements. Pure: the measuring is injected.

In: the roles, guesses, a function that measures sets. Out: the set to convert. Conversions are not independent: casts
are shared or fused, so two changes may gain what neither gains alone. From the best guess the search tries single
changes, all gaining changes together, and pairs. Then it measures the few best sets and the guesses again. Only those
later visits decide: the first visits have chosen the finalists, and so favour them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from fp8gate.calibrate.timing.statistics import Interval, ratio_of
from fp8gate.filter.contract.plans.fastest_set import MeasuredSet, fastest, gains

RoleSet = frozenset[str]
BF16_SET: RoleSet = frozenset()
CONTROL_SET: RoleSet = frozenset({"bf16 again"})
"""bf16, compiled, tuned and captured a second time. Its gain over the first shows how far equal sets differ."""

RULED_OUT = 4  # times the noise, after a single visit
FINALISTS = 4  # beside bf16; more are rarely within twice the noise of the best
SYNERGY = 0.03
"""Two changes are tried together unless they lose more than this share of the block by themselves. wk and wv are
neutral alone and cost 8 % together with wq, but no pair is known that wins back more than this."""


class Measure(Protocol):
    def __call__(self, candidates: Sequence[RoleSet], visits: int) -> Mapping[RoleSet, Sequence[float]]:
        """ln(bf16 / candidate) of every visit so far, at least `visits` of each candidate; none of one that failed.

        All candidates of a call are compiled together, and visited in the same rounds.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """How many visits screen a set and how many more decide among the finalists, and what counts as a gain.

    noise: of ln(time) of one visit; a change that gains less is not followed.
    """

    screening: int
    final: int
    confidence: float
    noise: float

    def is_final(self, log_ratios: Sequence[float]) -> bool:
        """Whether a set has all visits that decide."""
        return len(log_ratios) >= self.screening + self.final


def search(roles: Sequence[str], guesses: Iterable[RoleSet], measure: Measure, rules: Rules) -> RoleSet:
    """The set to convert: bf16 (the empty set) unless the lower bound of another set lies above it.

    roles: those that float8 can compute. guesses: where to start, the most trusted first.
    """
    first, *others = guesses
    known = _Known(roles, measure, rules, [first, *others])
    known.ask([first, *others, *known.singles(first)])
    center, explored = known.best(), set[RoleSet]()
    while True:
        explored.add(center)
        known.explore(center)
        better = known.best()
        if better in explored or not known.gains(better, center):
            better = known.winner()
            if better in explored or not known.gains(better, center):
                return better
        center = better


def search_all(roles: Sequence[str], guesses: Iterable[RoleSet], measure: Measure, rules: Rules) -> RoleSet:
    """The same, by measuring every set there is once, and screening those that this does not rule out."""
    known = _Known(roles, measure, rules, list(guesses))
    known.ask((frozenset(some) for n in range(len(roles) + 1) for some in itertools.combinations(roles, n)), visits=1)
    known.ask_again(within=RULED_OUT * rules.noise)
    return known.winner()


def gain(log_ratios: Sequence[float], rules: Rules) -> Interval:
    """bf16 / candidate time with bounds, from all visits of a candidate.

    For a finalist the final visits count, with bounds at the rules' confidence. For another candidate the screening
    counts; its bounds are the noise, wider if it has fewer visits. Raises ValueError for no visits, or for fewer final
    ones than that confidence needs (6 at 0.95).
    """
    final = log_ratios[rules.screening :]
    if len(final) >= rules.final:
        return ratio_of(final, confidence=rules.confidence)
    mean, noise = fmean(log_ratios), rules.noise * math.sqrt(max(1.0, rules.screening / len(log_ratios)))
    return Interval(math.exp(mean), math.exp(mean - noise), math.exp(mean + noise))


def measured_set(candidate: RoleSet, log_ratios: Sequence[float], rules: Rules) -> MeasuredSet:
    """A set with its gain. Raises ValueError for no visits."""
    found = gain(log_ratios, rules)
    is_screened = len(log_ratios) >= rules.screening
    return MeasuredSet(candidate, found.estimate, found.low, rules.is_final(log_ratios), is_screened)


class _Known:
    """What has been measured so far, and the questions that follow from it."""

    def __init__(self, roles: Sequence[str], measure: Measure, rules: Rules, guesses: Sequence[RoleSet]) -> None:
        self.roles, self.measure, self.rules, self.guesses = roles, measure, rules, guesses
        self._ratios: dict[RoleSet, Sequence[float]] = {BF16_SET: (0.0,)}

    def ask(self, candidates: Iterable[RoleSet], visits: int | None = None) -> None:
        """Screen those that are new, in so many visits."""
        new = [candidate for candidate in dict.fromkeys(candidates) if candidate not in self._ratios]
        if new:
            self._ratios.update(self.measure(new, visits or self.rules.screening))

    def ask_again(self, within: float) -> None:
        """Complete the screening of the candidates that are no farther than that from the best."""
        least = self.value(self.best()) - within
        near = [one for one in self._ratios if one != BF16_SET and self.value(one) >= least]
        self._ratios.update(self.measure(near, self.rules.screening))

    def value(self, candidate: RoleSet) -> float:
        """ln(bf16 / candidate); minus infinity for one that failed."""
        ratios = self._ratios[candidate]
        if candidate == BF16_SET:
            return 0.0
        return math.log(gain(ratios, self.rules).estimate) if ratios else -math.inf

    def gains(self, candidate: RoleSet, center: RoleSet) -> bool:
        """Whether it is better by more than the noise."""
        return gains(self.value(candidate), self.value(center), noise=self.rules.noise)

    def best(self, among: Iterable[RoleSet] = ()) -> RoleSet:
        """The best candidate; among equals the smallest, as a linear that need not be converted stays in bf16."""
        return max(among or self._ratios, key=lambda candidate: (self.value(candidate), -len(candidate)))

    def singles(self, center: RoleSet) -> list[RoleSet]:
        return [center ^ {role} for role in self.roles]

    def explore(self, center: RoleSet) -> None:
        """Try single changes and all gaining ones together; pairs too, if none of these gains more than the noise."""
        self.ask(self.singles(center))
        changes = {role: self.value(center ^ {role}) - self.value(center) for role in self.roles}
        self.ask([center.symmetric_difference(role for role, change in changes.items() if change > 0)])
        if self.gains(self.best(), center):
            return
        pairs = itertools.combinations(self.roles, 2)
        self.ask([center ^ {*pair} for pair in pairs if sum(changes[role] for role in pair) > -SYNERGY])

    def winner(self) -> RoleSet:
        """Measure the few best against each other, and any set that then looks better than they do, until none does.

        The guesses take part, good or not: people ask what a plan gains over them.
        """
        new = [
            one for one in dict.fromkeys([*self._few_best(), *self.guesses]) if one != BF16_SET and self._ratios[one]
        ]
        while new:
            self._ratios.update(self.measure(new, self.rules.screening + self.rules.final))
            best = self.best([BF16_SET, *filter(self._is_final, self._ratios)])
            new = [one for one in self._few_best() if not self._is_final(one) and self.gains(one, best)]
        finalists = [
            measured_set(one, self._ratios[one], self.rules)
            for one in self._ratios
            if one != BF16_SET and self._is_final(one)
        ]
        return frozenset(fastest(finalists, noise=self.rules.noise).convert)

    def _few_best(self) -> list[RoleSet]:
        top = self.value(self.best()) - 2 * self.rules.noise
        ranked = sorted(self._ratios, key=lambda candidate: (-self.value(candidate), len(candidate)))
        return [one for one in ranked if one != BF16_SET and self.value(one) >= top][:FINALISTS]

    def _is_final(self, candidate: RoleSet) -> bool:
        return self.rules.is_final(self._ratios[candidate])
