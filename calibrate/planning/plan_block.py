"""Plan a block: search the set of its roles that trains fastest in float8, by measuring sets inside the compiled block.

In: a block and the inputs it is called with, a recipe. Out: a `Plan`. Every visit is kept in a journal at once. After
Ctrl-C, a kill or stop_after_s, the same call goes on; what was measured until then makes an incomplete plan.
Try it: fp8gate plan llama3-8b --recipe rowwise --tokens 8192
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from fp8gate.calibrate.arms.blueprint import Blueprint
from fp8gate.calibrate.device.lock import DeviceLock
from fp8gate.calibrate.device.registry import choose_device, describe_device, describe_software
from fp8gate.calibrate.planning.block_worker import PlanJob
from fp8gate.calibrate.planning.block_worker_pool import BlockWorkerPool
from fp8gate.calibrate.planning.plan_protocol import make_protocol, useful_block_workers
from fp8gate.calibrate.planning.search import (
    BF16_SET,
    CONTROL_SET,
    RoleSet,
    Rules,
    gain,
    measured_set,
    search,
    search_all,
)
from fp8gate.calibrate.planning.subject import Subject
from fp8gate.calibrate.planning.table_answer import TableAnswer
from fp8gate.calibrate.planning.visit_journal import PlanJournal, PlanSetup
from fp8gate.calibrate.planning.visit_rounds import VisitRounds
from fp8gate.calibrate.processes.run_folder import run_folder
from fp8gate.calibrate.sweep.progress import steps_bar
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.plain_yaml import round_to_measured
from fp8gate.filter.contract.plans.fastest_set import fastest
from fp8gate.filter.contract.plans.plan import Candidate, Plan, PlanProtocol, exceeds_control
from fp8gate.filter.contract.recipes import Recipe, Variant
from fp8gate.filter.model.model_linears import grouped_weights

FEW_ROLES = 7  # of a Llama block: 128 sets


def plan(
    block: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    *,
    recipe: Recipe,
    name: str = "block",
    layers: str = "",
    recomputed: bool = False,
    **options: Any,
) -> Plan:
    """Plan any block of layers. Linears are grouped by role: the name within the block without layer indices.

    example_inputs: the arguments that it is called with in training. Random data replaces the parameters, and the
    inputs that require a gradient. layers: which layers of the model are such blocks ("transformer_blocks.0-18"); ""
    for all that are in a list named `layers`. recomputed: under activation checkpointing. options: of `plan_subject`.
    Raises BlockError for a block that cannot be planned.
    """
    blueprint = Blueprint.of(block, example_inputs, recomputed=recomputed)
    whole = {role: (shape.k, shape.n) for role, shape in blueprint.shapes.items()}
    tokens = max(shape.m for shape in blueprint.shapes.values())
    return plan_subject(
        Subject(name=name, blueprint=blueprint, whole=whole, tokens=tokens, layers=layers), recipe=recipe, **options
    )


def plan_subject(
    subject: Subject,
    *,
    recipe: Recipe,
    device: torch.device | None = None,
    protocol: PlanProtocol | None = None,
    tables: Path | None = None,
    exhaustive: bool = False,
    workers: int | None = None,
    out: Path | None = None,
    fresh: bool = False,
    stop_after_s: float | None = None,
    on_stop: Callable[[Plan], None] = lambda plan: None,
    say: Callable[[str], None] = lambda message: None,
    shows_bar: bool = False,
) -> Plan:
    """The plan of a block for one recipe.

    protocol: it says the casts too; None for Inductor's. tables: where to look for the table, see `find_table`; without
    one the search starts from torchao's rule. exhaustive: measure every set. workers: that compile, 0 for this
    one alone; None: on a GPU as many as the cores allow. out: a folder for the journal; with None there is none.
    on_stop: is given an incomplete plan of what there is, if the search ends early, by an error, Ctrl-C or a signal,
    and another set than bf16 was visited. say: is told of every step. shows_bar: show on standard error how much is
    done, if that is a terminal.
    Raises InputError for too many roles to be exhaustive about, JournalError, DeviceBusyError, StoppedError when the
    time is up or the GPU slows down, and BlockWorkerDiedError; the same call goes on.
    """
    start = time.monotonic()
    device = device or choose_device(None)
    protocol = protocol or make_protocol(device, recipe)
    setup = _setup(subject, recipe, device, protocol)
    roles = subject.possible
    if not roles:
        raise InputError("block: expected a linear that may be converted, with multiples of 16; found none")
    if exhaustive and len(roles) > FEW_ROLES:
        raise InputError(f"exhaustive: expected at most {FEW_ROLES} roles, {2**FEW_ROLES} sets; got {len(roles)}")
    variant = Variant(recipe, protocol.casts)
    answer = TableAnswer.of(subject, variant, setup.device.name, tables, say)
    job = PlanJob(blueprint=subject.blueprint, recipe=recipe, protocol=protocol, device=device)
    if workers is None:
        workers = useful_block_workers(subject.blueprint, setup.device, protocol)
    until = math.inf if stop_after_s is None else start + stop_after_s
    with (
        tempfile.TemporaryDirectory(dir=run_folder()) as nowhere,
        DeviceLock(device),
        PlanJournal(out or Path(nowhere), setup, fresh=fresh) as journal,
        steps_bar(shows_bar) as bar,
    ):
        pool = BlockWorkerPool(job, workers, until=until)
        rounds = VisitRounds(pool, journal, subject.blueprint.shapes, say, start=start, until=until, bar=bar)
        planned = PlanSearch(subject, answer, rounds, exhaustive=exhaustive)
        try:
            with pool:
                what = " ".join(filter(None, (subject.name, subject.layers)))
                say(f"{setup.device.name}: {what}, {variant}, {len(roles)} roles, {workers} workers, {journal.path}")
                for remark in journal.remarks():
                    say(remark)
                return planned.finish()
        except BaseException:  # Ctrl-C and signals too
            if so_far := planned.so_far():
                on_stop(so_far)
            raise


def _setup(subject: Subject, recipe: Recipe, device: torch.device, protocol: PlanProtocol) -> PlanSetup:
    return PlanSetup(
        recipe=recipe,
        model=subject.name,
        tokens=subject.tokens,
        sequence=subject.sequence,
        tp=subject.tp,
        recompute="full" if subject.blueprint.recomputed else "none",
        device=describe_device(device),
        software=describe_software(device),
        protocol=protocol,
        block=subject.blueprint.identity,
        shapes={role: (shape.m, shape.k, shape.n) for role, shape in subject.blueprint.shapes.items()},
    )


@dataclass(frozen=True, slots=True)
class PlanSearch:
    """The search for the plan of a block: to its end, or as far as it came."""

    subject: Subject
    answer: TableAnswer
    rounds: VisitRounds
    exhaustive: bool = False

    @property
    def setup(self) -> PlanSetup:
        return self.rounds.journal.setup

    @property
    def rules(self) -> Rules:
        protocol = self.setup.protocol
        return Rules(
            screening=protocol.screening, final=protocol.final, confidence=protocol.confidence, noise=protocol.noise
        )

    def finish(self) -> Plan:
        """Measure what the search asks for. Raises as `plan_subject` does."""
        rounds, rules = self.rounds, self.rules
        look = search_all if self.exhaustive else search
        chosen = look(self.subject.possible, self.answer.guesses, self._measure, rules)
        rounds([BF16_SET], 1)  # it may be all that could be measured
        rounds([CONTROL_SET], rules.screening + rules.final)
        control = self._control()
        if chosen != BF16_SET and not exceeds_control(self._low(chosen), control):
            rounds.say(f"bf16 stays: no set gains more than bf16 loaded again, {control and f'{control:.4f}x'}")
            chosen = BF16_SET
        rounds.say(rounds.summary())
        return self._plan(chosen, control)

    def so_far(self) -> Plan | None:
        """The incomplete plan of the visits that were made. None if bf16 and another set have not been visited yet.

        It converts the best set by the rule of the search, in which a set that was only screened counts too; bf16 if
        that gains no more than bf16 over itself. The control counts with the visits that it has.
        """
        self.rounds.failed.pop(BF16_SET, None)  # an earlier call may have visited what this one cannot even load
        measured = [one for one in self.rounds.candidates if self.rounds.log_ratios(one)]
        if BF16_SET not in measured or len(measured) == 1:
            return None
        sets = (measured_set(one, self.rounds.log_ratios(one), self.rules) for one in measured if one != BF16_SET)
        best, control = frozenset(fastest(sets, noise=self.rules.noise).convert), self._control()
        is_compared = control is not None or CONTROL_SET in self.rounds.failed
        if best != BF16_SET and is_compared and not exceeds_control(self._low(best), control):
            best = BF16_SET
        return msgspec.structs.replace(self._plan(best, control), incomplete=True)

    def _measure(self, candidates: Sequence[RoleSet], visits: int) -> dict[RoleSet, tuple[float, ...]]:
        """Rounds of final visits visit bf16 loaded again too, so that it needs no rounds of its own."""
        is_final = visits == self.rules.screening + self.rules.final
        found = self.rounds([*candidates, CONTROL_SET] if is_final else candidates, visits)
        return {one: found[one] for one in candidates}

    def _control(self) -> float | None:
        """bf16 / bf16 loaded again; None if it could not be, or was not yet."""
        ratios = self.rounds.log_ratios(CONTROL_SET)
        return gain(ratios, self.rules).estimate if ratios else None

    def _low(self, one: RoleSet) -> float:
        """The lower bound of a set's gain, as the file has it."""
        return round_to_measured(gain(self.rounds.log_ratios(one), self.rules).low)

    def _plan(self, chosen: RoleSet, control: float | None) -> Plan:
        """`measured_at` is that of the newest record, so that the same visits give the same plan."""
        subject, answer, rounds, setup = self.subject, self.answer, self.rounds, self.setup
        bf16_us = sum(rounds.times(BF16_SET, 0))
        candidates = [_candidate(one, rounds, self.rules, answer.predicted(one, bf16_us)) for one in rounds.candidates]
        candidates.sort(key=lambda one: (one.convert != (), -(one.speedup or 0.0), one.convert))
        header = {name: getattr(setup, name) for name in setup.__struct_fields__}
        return Plan(
            **header,
            measured_at=max(record.measured_at for record in rounds.journal.records),
            indivisible=tuple(role for role, shape in subject.blueprint.shapes.items() if shape.indivisible()),
            left_alone=grouped_weights(subject.blueprint.template),
            table=answer.table,
            torchao=answer.torchao,
            control=control,
            convert=rounds.in_order(chosen),
            exhaustive=self.exhaustive,
            left_out=subject.left_out,
            layers=subject.layers,
            candidates=tuple(candidates),
        )


def _candidate(one: RoleSet, rounds: VisitRounds, rules: Rules, predicted: float | None) -> Candidate:
    convert, failed = rounds.in_order(one), rounds.failed.get(one)
    if failed:
        return Candidate(convert, 0, None, None, None, None, None, predicted, None, failed)
    ratios = rounds.log_ratios(one)
    is_final = rules.is_final(ratios)
    fwd_us, bwd_us = rounds.times(one, rules.screening if is_final and one != BF16_SET else 0)
    found = gain(ratios, rules)
    bounds = (1.0, 1.0, 1.0) if one == BF16_SET else (found.estimate, found.low, found.high)
    return Candidate(convert, len(ratios), fwd_us, bwd_us, *bounds, predicted, rounds.errors[one], "measured")
