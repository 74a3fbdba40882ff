"""The search finds the planted best set, is not fooled by noise, and asks for little."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from fp8gate.calibrate.planning.search import BF16_SET, Rules, gain, measured_set, search, search_all
from fp8gate.filter.contract.plans.plan_file import read_plan
from fp8gate.filter.locate.places import packaged_thresholds

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
ALL = frozenset(ROLES)
RULES = Rules(screening=1, final=6, confidence=0.95, noise=0.005)
NOISE = 0.002  # of ln(time) of a visit: windows of a second agree within 0.44 %
NEUTRAL_ALONE = {("k", "v"): -0.04, ("k", "q"): -0.02, ("v", "q"): -0.02}
SHARED_CAST = {("gate", "up"): 0.06}


class FakeBlock:
    """Times that are known: what each role saves alone and what pairs save beyond that, as shares of the block."""

    def __init__(self, alone, together=(), *, noise=0.0, seed=0, fails=()):
        self.alone, self.together, self.fails = dict(zip(ROLES, alone, strict=True)), dict(together), fails
        self.noise, self.rng = noise, random.Random(seed)
        self.visits = {}
        self.calls = []

    def truth(self, candidate):
        """ln(bf16 / candidate)."""
        pairs = (saved for pair, saved in self.together.items() if candidate.issuperset(pair))
        return -math.log(1 - sum(self.alone[role] for role in candidate) - sum(pairs))

    def __call__(self, candidates, visits):
        self.calls.append(list(candidates))
        lacking = {one: visits - len(self.visits.setdefault(one, [])) for one in candidates}
        for _ in range(max(lacking.values())):
            bf16 = self.rng.gauss(0, self.noise)
            for one in candidates:
                if one not in self.fails:
                    self.visits[one].append(self.truth(one) + bf16 + self.rng.gauss(0, self.noise))
        return {one: tuple(self.visits[one]) for one in candidates}

    @property
    def best(self):
        sets = (frozenset(some) for n in range(len(ROLES) + 1) for some in itertools.combinations(ROLES, n))
        return max(sets, key=lambda one: (self.truth(one), -len(one)))

    def loss(self, candidate):
        return self.truth(self.best) - self.truth(candidate)


TENSORWISE = {"alone": (0.03, 0.0, 0.0, 0.03, 0.06, 0.06, 0.05), "together": NEUTRAL_ALONE}
ROWWISE = {"alone": (0.004, -0.01, -0.01, 0.004, -0.01, -0.01, 0.01), "together": SHARED_CAST}
FLAT = {"alone": (0.0,) * 7}
LOSING = {"alone": (-0.02, -0.03, -0.03, -0.01, -0.01, -0.01, -0.02)}


@pytest.mark.parametrize("planted", [TENSORWISE, ROWWISE, FLAT, LOSING])
@pytest.mark.parametrize("guess", [BF16_SET, ALL, frozenset({"gate", "up", "down"}), frozenset({"k", "v"})])
def test_it_finds_the_planted_best_set_from_anywhere(planted, guess):
    block = FakeBlock(**planted)
    assert search(ROLES, [guess, BF16_SET, ALL], block, RULES) == block.best


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("planted", [TENSORWISE, ROWWISE])
def test_noise_costs_less_than_half_a_percent(planted, seed):
    block = FakeBlock(**planted, noise=NOISE, seed=seed)
    assert block.loss(search(ROLES, [ALL, BF16_SET], block, RULES)) < 0.005


@pytest.mark.parametrize("planted", [FLAT, LOSING])
def test_noise_alone_seldom_passes_for_a_gain_and_then_costs_nothing(planted):
    """Six visits of one sign happen once in 64 times to each of four finalists."""
    chosen = [search(ROLES, [ALL, BF16_SET], FakeBlock(**planted, noise=NOISE, seed=seed), RULES) for seed in range(40)]
    assert all(FakeBlock(**planted).loss(one) < 0.001 for one in chosen)
    assert sum(one != BF16_SET for one in chosen) <= 6


@pytest.mark.parametrize("planted", [TENSORWISE, ROWWISE, FLAT, LOSING])
def test_it_asks_for_a_fraction_of_all_sets_in_few_calls(planted):
    block = FakeBlock(**planted, noise=NOISE)
    search(ROLES, [ALL - {"k", "v"}, BF16_SET, ALL], block, RULES)
    assert len(block.visits) < 40
    assert len(block.calls) < 9
    assert sum(len(visits) > RULES.screening for visits in block.visits.values()) <= 9


def test_nothing_is_measured_twice_but_finalists():
    block = FakeBlock(**ROWWISE)
    search(ROLES, [ALL, ALL, BF16_SET], block, RULES)
    screened = [one for call in block.calls[:-1] for one in call]
    assert len(screened) == len(set(screened))
    assert BF16_SET not in block.visits  # measuring visits bf16 in every round


def test_a_pair_is_found_that_neither_half_leads_to():
    """Its halves lose 2 % together, alone, and gain 4 % as a pair."""
    block = FakeBlock((-0.05, -0.05, -0.05, -0.05, -0.01, -0.01, -0.05), SHARED_CAST)
    assert search(ROLES, [BF16_SET], block, RULES) == {"gate", "up"}


def test_a_set_that_fails_is_left_out():
    block = FakeBlock(**TENSORWISE, fails=[ALL - {"k", "v"}])
    chosen = search(ROLES, [ALL, BF16_SET], block, RULES)
    assert chosen not in block.fails
    assert block.truth(chosen) > 0


def test_a_round_in_which_bf16_was_slow_fools_nobody():
    """Everything in it looks a third faster; each of it that still does is measured again."""
    block = FakeBlock(**LOSING)
    first = []

    def disturbed(candidates, visits):
        found = block(candidates, visits)
        first.extend(() if first else candidates)
        return {one: (ratios[0] + 0.3 * (one in first), *ratios[1:]) for one, ratios in found.items()}

    assert search(ROLES, [ALL], disturbed, RULES) == BF16_SET


def test_if_all_fail_bf16_is_left():
    sets = [frozenset(some) for n in range(1, 8) for some in itertools.combinations(ROLES, n)]
    assert search(ROLES, [ALL], FakeBlock(**TENSORWISE, fails=sets), RULES) == BF16_SET


@pytest.mark.parametrize("planted", [TENSORWISE, ROWWISE, LOSING])
def test_exhaustive_measures_every_set_and_finds_the_same(planted):
    block = FakeBlock(**planted)
    assert search_all(ROLES, [ALL], block, RULES) == block.best
    assert len(block.visits) == 2 ** len(ROLES) - 1


@pytest.mark.parametrize("seed", range(5))
def test_exhaustive_screens_what_one_visit_does_not_rule_out(seed):
    rules = Rules(screening=2, final=6, confidence=0.95, noise=0.005)
    block = FakeBlock(**TENSORWISE, noise=NOISE, seed=seed)
    assert block.loss(search_all(ROLES, [ALL], block, rules)) < 0.005
    screened_once = [one for one, visits in block.visits.items() if len(visits) == 1]
    assert len(screened_once) > 90
    assert min(block.loss(one) for one in screened_once) > 0.01


def test_guesses_are_measured_as_well_as_the_best():
    """People ask what the choice gains over them; here they lose."""
    guesses = [ALL, frozenset({"k", "v"}), BF16_SET]
    for find in (search, search_all):
        block = FakeBlock(**TENSORWISE)
        assert find(ROLES, guesses, block, RULES) == block.best
        assert [len(block.visits[one]) for one in guesses[:2]] == [RULES.screening + RULES.final] * 2


def test_a_guess_that_fails_is_no_finalist():
    block = FakeBlock(**TENSORWISE, fails=[ALL])
    assert search(ROLES, [ALL], block, RULES) == block.best
    assert ALL not in block.calls[-1]


def test_on_a_real_blocks_sets_it_stays_within_half_a_percent_of_the_best():
    """All 128 as an exhaustive plan measured them, and visits that vary as they did there."""
    plan = read_plan(packaged_thresholds() / "nvidia-h200" / "plans" / "llama3-8b-rowwise-m8192.yaml")
    assert plan.exhaustive
    truth = {frozenset(one.convert): math.log(one.speedup) for one in plan.candidates}
    guesses = [frozenset(plan.table.convert), frozenset(plan.shapes)]
    rules = Rules(screening=2, final=6, confidence=0.95, noise=plan.protocol.noise)
    losses, measured = [], []
    for seed in range(60):
        block = FakeBlock(FLAT["alone"], noise=0.0037, seed=seed)
        block.truth = truth.__getitem__
        losses.append(max(truth.values()) - truth[search(list(plan.shapes), guesses, block, rules)])
        measured.append(len(block.visits))
    assert sum(loss > 0.005 for loss in losses) <= 1
    assert max(losses) < 0.007
    assert max(measured) < 40


def test_the_gain_of_a_finalist_is_that_of_its_final_visits():
    """The first one chose it, so it is too good to count."""
    chosen_by = (0.5,)
    assert gain((*chosen_by, *[0.1] * 6), RULES).estimate == pytest.approx(math.exp(0.1))


def test_the_gain_of_others_is_known_within_the_noise():
    found = gain((0.1,), RULES)
    assert (math.log(found.low), math.log(found.high)) == pytest.approx((0.095, 0.105))
    one_of_four = gain((0.1,), Rules(screening=4, final=6, confidence=0.95, noise=0.005))
    assert (math.log(one_of_four.low), math.log(one_of_four.high)) == pytest.approx((0.09, 0.11))


def test_bounds_lie_above_one_only_if_every_final_visit_does():
    assert gain((0.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.01), RULES).low > 1
    assert gain((0.0, 0.1, 0.1, 0.1, 0.1, 0.1, -0.01), RULES).low < 1


def test_a_measured_set_says_how_far_its_visits_came():
    rules = Rules(screening=2, final=6, confidence=0.95, noise=0.005)
    found = [measured_set(ALL, (0.1,) * visits, rules) for visits in (1, 2, 7, 8)]
    assert [one.is_screened for one in found] == [False, True, True, True]
    assert [one.is_final for one in found] == [False, False, False, True]
    assert [one.speedup for one in found] == pytest.approx([math.exp(0.1)] * 4)
    assert found[0].speedup_low < found[1].speedup_low == found[2].speedup_low < found[3].speedup_low
