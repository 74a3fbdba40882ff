"""Plan a block: search the set of its roles that trains fastest in float8, by measuring sets inside the compiled block.

In: a block and the inputs it is called with, a recipe. Out: a `Plan`. Every visit is kept in a journal at once. After
Ctrl-C, a kill or stop_after_s, the same call goes on.
Try it: fp8gate plan llama3-8b --recipe rowwise --tokens 8192
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

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
    Measure,
    RoleSet,
    Rules,
    gain,
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
    say: Callable[[str], None] = lambda message: None,
    shows_bar: bool = False,
) -> Plan:
    """The plan of a block for one recipe.

    protocol: it says the casts too; None for Inductor's. tables: where to look for the table, see `find_table`; without
    one the search starts from torchao's rule. exhaustive: measure every set. workers: that compile, 0 for this
    one alone; None: on a GPU as many as the cores allow. out: a folder for the journal; with None there is none. say:
    is told of every step. shows_bar: show on standard error how much is done, if that is a terminal.
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
    rules = Rules(
        screening=protocol.screening, final=protocol.final, confidence=protocol.confidence, noise=protocol.noise
    )
    with tempfile.TemporaryDirectory(dir=run_folder()) as nowhere, DeviceLock(device):
        with (
            PlanJournal(out or Path(nowhere), setup, fresh=fresh) as journal,
            BlockWorkerPool(job, workers, until=until) as pool,
            steps_bar(shows_bar) as bar,
        ):
            what = " ".join(filter(None, (subject.name, subject.layers)))
            say(f"{setup.device.name}: {what}, {variant}, {len(roles)} roles, {workers} workers, {journal.path}")
            for remark in journal.remarks():
                say(remark)
            rounds = VisitRounds(pool, journal, subject.blueprint.shapes, say, start=start, until=until, bar=bar)
            measure = _with_control(rounds, rules)
            chosen = (search_all if exhaustive else search)(roles, answer.guesses, measure, rules)
            rounds([BF16_SET], 1)  # it may be all that could be measured
            control = _control(rounds, rules)
            if chosen != BF16_SET and not exceeds_control(gain(rounds.log_ratios(chosen), rules).low, control):
                say(f"bf16 stays: no set gains more than bf16 loaded again, {control and f'{control:.4f}x'}")
                chosen = BF16_SET
            say(rounds.summary())
        return _make_plan(setup, subject, roles, answer, rounds, rules, chosen, control, exhaustive)


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


def _make_plan(
    setup: PlanSetup,
    subject: Subject,
    roles: Sequence[str],
    answer: TableAnswer,
    rounds: VisitRounds,
    rules: Rules,
    chosen: RoleSet,
    control: float | None,
    exhaustive: bool,
) -> Plan:
    bf16_us = sum(rounds.times(BF16_SET, 0))
    candidates = [_candidate(one, rounds, rules, answer.predicted(one, bf16_us)) for one in rounds.candidates]
    candidates.sort(key=lambda one: (one.convert != (), -(one.speedup or 0.0), one.convert))
    header = {name: getattr(setup, name) for name in setup.__struct_fields__}
    return Plan(
        **header,
        measured_at=datetime.now(timezone.utc).replace(microsecond=0),
        indivisible=tuple(role for role, shape in subject.blueprint.shapes.items() if shape.indivisible()),
        left_alone=grouped_weights(subject.blueprint.template),
        table=answer.table,
        torchao=answer.torchao,
        control=control,
        convert=rounds.in_order(chosen),
        exhaustive=exhaustive,
        left_out=subject.left_out,
        layers=subject.layers,
        candidates=tuple(candidates),
    )


def _with_control(rounds: VisitRounds, rules: Rules) -> Measure:
    """Rounds of final visits visit bf16 loaded again too, so that it needs no rounds of its own."""

    def measure(candidates: Sequence[RoleSet], visits: int) -> dict[RoleSet, tuple[float, ...]]:
        is_final = visits == rules.screening + rules.final
        found = rounds([*candidates, CONTROL_SET] if is_final else candidates, visits)
        return {one: found[one] for one in candidates}

    return measure


def _control(rounds: VisitRounds, rules: Rules) -> float | None:
    """bf16 / bf16 loaded again; None if it could not be."""
    ratios = rounds([CONTROL_SET], rules.screening + rules.final)[CONTROL_SET]
    return gain(ratios, rules).estimate if ratios else None


def _candidate(one: RoleSet, rounds: VisitRounds, rules: Rules, predicted: float | None) -> Candidate:
    convert, failed = rounds.in_order(one), rounds.failed.get(one)
    if failed:
        return Candidate(convert, 0, None, None, None, None, None, predicted, None, failed)
    ratios = rounds.log_ratios(one)
    is_final = len(ratios) >= rules.screening + rules.final
    fwd_us, bwd_us = rounds.times(one, rules.screening if is_final and one != BF16_SET else 0)
    found = gain(ratios, rules)
    bounds = (1.0, 1.0, 1.0) if one == BF16_SET else (found.estimate, found.low, found.high)
    return Candidate(convert, len(ratios), fwd_us, bwd_us, *bounds, predicted, rounds.errors[one], "measured")
