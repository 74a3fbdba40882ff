"""Rounds of visits: bf16 and the sets asked about, each alone on the device, in random order; all of it in a journal.

In: sets of roles, how many visits each. Out: ln(bf16 / set) of every round; a set that failed has none.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from statistics import fmean
from typing import Any

from fp8gate.calibrate.arms.failure import Failure
from fp8gate.calibrate.device.watch import spoils_timings
from fp8gate.calibrate.planning.block_worker import Done, Visit
from fp8gate.calibrate.planning.block_worker_pool import BlockWorkerDiedError, BlockWorkerPool, StoppedError
from fp8gate.calibrate.planning.search import BF16_SET, CONTROL_SET, RoleSet
from fp8gate.calibrate.planning.visit_journal import PlanJournal, VisitRecord
from fp8gate.calibrate.sweep.progress import Steps, StepsBar
from fp8gate.filter.contract.plans.plan import CandidateStatus

MAX_ATTEMPTS = 2  # calls in which a set may fail: memory may have been taken the first time
MAX_SLOWDOWNS = 3  # in a row: the GPU will not get faster by waiting


class VisitRounds:
    """Measures for a search. start, until: of `time.monotonic`; no step begins after `until`. bar: shows the steps."""

    def __init__(
        self,
        pool: BlockWorkerPool,
        journal: PlanJournal,
        roles: Iterable[str],
        say: Callable[[str], None],
        *,
        start: float,
        until: float = math.inf,
        bar: StepsBar | None = None,
    ) -> None:
        self.pool, self.journal, self.say = pool, journal, say
        self.roles = [*roles, *CONTROL_SET]
        self.errors: dict[RoleSet, float] = {}
        self.failed: dict[RoleSet, CandidateStatus] = {}
        self._loaded: set[RoleSet] = set()
        self._others: set[str] = set()
        self._visits: defaultdict[RoleSet, dict[int, tuple[float, float]]] = defaultdict(dict)
        self._round = 0
        self._steps, self._bar = Steps(0), bar
        self._start, self._until = start, until
        self._spent_s: defaultdict[str, float] = defaultdict(float)
        failures = Counter(frozenset(record.convert) for record in journal.records if record.status != "measured")
        for record in journal.records:
            one = frozenset(record.convert)
            if record.status == "measured" or (one != BF16_SET and failures[one] >= MAX_ATTEMPTS):
                self._note(record)

    def __call__(self, candidates: Sequence[RoleSet], visits: int) -> dict[RoleSet, tuple[float, ...]]:
        """Raises StoppedError when the time is up or the GPU slows down again and again, BlockWorkerDiedError.

        A journal may know more visits. They are left out, so that a search that is run again asks the same questions.
        """
        self._steps = Steps(self._count(candidates, visits))
        while lacking := [one for one in candidates if self._lacks(one, visits)]:
            new = [one for one in dict.fromkeys([BF16_SET, *lacking]) if one not in self._loaded]
            if new:
                self._load(new)
            self._run_round(list(dict.fromkeys([BF16_SET, *(one for one in lacking if one not in self.failed)])))
        return {one: self.log_ratios(one)[:visits] for one in candidates}

    @property
    def candidates(self) -> list[RoleSet]:
        known = [one for one in dict.fromkeys([*self._visits, *self.failed]) if one != CONTROL_SET]
        return [one for one in known if one in self.failed or self.log_ratios(one)]

    def log_ratios(self, one: RoleSet) -> tuple[float, ...]:
        """ln(bf16 / set) of forward plus backward, for each round in which both were visited, in order."""
        if one in self.failed:
            return ()
        bf16, visits = self._visits[BF16_SET], self._visits[one]
        return tuple(math.log(sum(bf16[at]) / sum(times)) for at, times in sorted(visits.items()) if at in bf16)

    def times(self, one: RoleSet, leave_out: int) -> tuple[float, float]:
        """Mean forward and backward in microseconds, without the first `leave_out` visits."""
        visits = [times for at, times in sorted(self._visits[one].items()) if at in self._visits[BF16_SET]][leave_out:]
        return fmean(fwd for fwd, _ in visits), fmean(bwd for _, bwd in visits)

    def in_order(self, one: RoleSet) -> tuple[str, ...]:
        return tuple(role for role in self.roles if role in one)

    def summary(self) -> str:
        """Where the time went, for people."""
        spent = ", ".join(f"{what} {seconds:.0f}" for what, seconds in self._spent_s.items())
        return f"{self._elapsed()}: {spent}"

    def _lacks(self, one: RoleSet, visits: int) -> bool:
        return one not in self.failed and len(self.log_ratios(one)) < visits

    def _count(self, candidates: Sequence[RoleSet], visits: int) -> int:
        """How many visits are to come: those that the sets lack, and as many of bf16 as there will be rounds."""
        lacking = {one: visits - len(self.log_ratios(one)) for one in candidates if self._lacks(one, visits)}
        rounds = max(lacking.values(), default=0)
        return sum(count for one, count in lacking.items() if one != BF16_SET) + rounds

    def _load(self, new: Sequence[RoleSet]) -> None:
        """Compile together, load one by one. Raises StoppedError when the time is up."""
        begin, steps = time.monotonic(), Steps(len(new))
        try:
            self._require_time()
            for one, answer in self.pool.compile(new):
                self._spend("waiting for compilers", begin)
                self._require_time()
                begin = time.monotonic()
                loaded = self.pool.load(one) if isinstance(answer, Done) else answer
                self._spend("loading and tuning", begin)
                begin, left = time.monotonic(), self._count_step(steps, "sets compiled and loaded")
                if isinstance(loaded, Done):
                    self._loaded.add(one)
                    self.errors[one] = loaded.error
                    self.say(f"{self._elapsed()} ready {steps.done} of {steps.total}{left}: {self._name(one)}")
                elif isinstance(loaded, Failure):
                    self._fail(one, loaded)
                self._require_bf16()
        except BlockWorkerDiedError as error:
            self._fail(error.roles, Failure("failed", error.reason))
            raise

    def _require_bf16(self) -> None:
        if BF16_SET in self.failed:
            raise StoppedError("bf16 could not be measured, so nothing can be compared with it; try fewer --workers")

    def _run_round(self, sets: Sequence[RoleSet]) -> None:
        self._require_time()
        self._round += 1
        begin = time.monotonic()
        self._look_for_others()
        rng = random.Random(f"{self.journal.setup.protocol.seed} {self._round}")
        for one in rng.sample(sets, len(sets)):
            self._require_time()
            self._visit(one)
            self._require_bf16()
        self._spend("visits", begin)

    def _look_for_others(self) -> None:
        """Name each other process on the device once."""
        for other in self.pool.others():
            if other not in self._others:
                self._others.add(other)
                self.say(spoils_timings(other))

    def _require_time(self) -> None:
        if time.monotonic() >= self._until:
            raise StoppedError("the time is up")

    def _visit(self, one: RoleSet) -> None:
        answer = self._undisturbed(one)
        if isinstance(answer, Failure):
            self._fail(one, answer)
            return
        self._keep(
            one,
            fwd_us=round(answer.fwd_us, 3),
            bwd_us=round(answer.bwd_us, 3),
            error=self.errors[one],
            sm_clock_mhz=answer.sm_clock_mhz,
            is_limited=answer.is_limited,
        )
        ms = (answer.fwd_us + answer.bwd_us) / 1e3
        left = self._count_step(self._steps, "visits")
        count = f"visit {self._steps.done} of {self._steps.total}{left}"
        self.say(f"{self._elapsed()} round {self._round}, {count}: {ms:.3f} ms {self._name(one)}")

    def _count_step(self, steps: Steps, what: str) -> str:
        left = steps.one_more()
        if self._bar:
            self._bar.show(steps, what)
        return left

    def _undisturbed(self, one: RoleSet) -> Visit | Failure:
        slowdown = None
        for _ in range(MAX_SLOWDOWNS):
            answer = self.pool.visit(one)
            assert not isinstance(answer, Done)
            if isinstance(answer, Failure) or answer.slowdown is None:
                return answer
            slowdown = answer.slowdown
            self.say(f"{self._elapsed()} {self._name(one)} again: {slowdown} of the GPU")
        raise StoppedError(f"{slowdown} of the GPU, {MAX_SLOWDOWNS} times in a row")

    def _fail(self, one: RoleSet, failure: Failure) -> None:
        self._keep(one, status=failure.status, detail=failure.detail)
        self.say(f"{self._elapsed()} {failure.status}: {self._name(one)}: {failure.detail}")

    def _keep(self, one: RoleSet, **fields: object) -> None:
        now = datetime.now(timezone.utc).replace(microsecond=0)
        made_of: dict[str, Any] = {"convert": self.in_order(one), "round": self._round, "measured_at": now, **fields}
        record = self.journal.record_type(**made_of)
        self.journal.append(record)
        self._note(record)

    def _note(self, record: VisitRecord) -> None:
        one = frozenset(record.convert)
        self._round = max(self._round, record.round)
        if record.status != "measured":
            self.failed[one] = record.status
        elif record.fwd_us and record.bwd_us:
            self._visits[one][record.round] = record.fwd_us, record.bwd_us
            self.errors[one] = record.error or 0.0

    def _spend(self, what: str, begin: float) -> None:
        self._spent_s[what] += time.monotonic() - begin

    def _name(self, one: RoleSet) -> str:
        return ", ".join(self.in_order(one)) or "bf16"

    def _elapsed(self) -> str:
        return f"{time.monotonic() - self._start:.0f} s"
