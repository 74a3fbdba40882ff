"""Plan a block: search the set of its roles that trains fastest in float8, by measuring sets inside the compiled block.

In: a block and the inputs it is called with, a recipe. Out: a `Plan`. Every visit is kept in a journal at once; after
Ctrl-C, a kill or stop_after_s the same call goes on.
Try it: fp8gate plan llama3-8b --recipe rowwise --tokens 8192
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from fp8gate.calibrate.arms.block import DATA, LAYER, Blueprint, bundled_facts, linears_in, sequence_of
from fp8gate.calibrate.arms.linear import inductor_settings
from fp8gate.calibrate.device.capacity import WORKER_DEVICE_GIB, default_workers
from fp8gate.calibrate.device.description import describe_device, describe_software
from fp8gate.calibrate.device.watch import DeviceLock
from fp8gate.calibrate.planning.block_worker import PlanJob
from fp8gate.calibrate.planning.block_worker_pool import BlockWorkerPool
from fp8gate.calibrate.planning.search import BF16_SET, CONTROL_SET, RoleSet, Rules, gain, search, search_all
from fp8gate.calibrate.planning.visit_rounds import PlanJournal, PlanSetup, VisitRounds
from fp8gate.filter.contract.devices import device_slug
from fp8gate.filter.contract.find_table import find_table
from fp8gate.filter.contract.names import block_role
from fp8gate.filter.contract.plan import PLANS, Candidate, Plan, PlanProtocol, TableUsed, exceeds_control
from fp8gate.filter.contract.recipes import RECIPES, Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Table, TableError
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP, decide
from fp8gate.filter.decision.lookup import Lookup
from fp8gate.filter.decision.torchao_rule import torchao_converts
from fp8gate.filter.model.linear_layer import grouped_weights
from fp8gate.filter.model.model_config import BUNDLED, linear_roles, load_model

VISIT_SETTLE_S, VISIT_RUN_S, VISIT_PAUSE_S = 0.2, 1.0, 0.15
"""A GPU at its power limit needs 0.2 s for the clock of what runs, and keeps to the limit over a second: such windows
agree within 0.44 %. It draws more after a pause, so each visit begins with the same (H200, LOG.md, 2026-11-24)."""
NOISE = 0.008  # of the ratio of two visits: whole seconds of one arm differ by 0.8 % (standard deviation, 2026-11-25)
SCREENING, FINAL, CONFIDENCE = 2, 6, 0.95  # 6 visits are the fewest that give these bounds
CPU_RUN_S, CPU_NOISE = 0.1, 0.1  # wall-clock times of a shared machine
COPIES, MAX_DEVICE_SHARE = 3, 0.8
"""A process holds about so many times a block's bf16 operands: weights and their gradients twice, once to compare with,
activations, and what is left of warming up. With what a worker needs that is 7.0 GiB for llama3-8b's block of 8192
tokens; 16 processes held 100 GiB (H200, 2026-11-25)."""
MOST_EXPERTS = 8  # that a token is sent to, in usual models
FEW_ROLES = 7  # of a Llama block: 128 sets


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is planned. name: of the model. whole: (in_features, out_features) of each role, undivided."""

    name: str
    blueprint: Blueprint
    whole: Mapping[str, tuple[int, int]]
    tokens: int
    sequence: int | None = None
    tp: int = 1


def plan(
    block: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    *,
    recipe: Recipe,
    name: str = "block",
    recomputed: bool = False,
    **options: Any,
) -> Plan:
    """Plan any block of layers. Linears are grouped by role: the name within the block without layer indices.

    example_inputs: the arguments it is called with in training, those that need a gradient so marked; these and the
    parameters are replaced by random data. recomputed: under activation checkpointing. options: of `plan_subject`.
    Raises BlockError for a block that cannot be planned.
    """
    blueprint = Blueprint.of(block, example_inputs, recomputed=recomputed)
    whole = {role: (shape.k, shape.n) for role, shape in blueprint.shapes.items()}
    tokens = max(shape.m for shape in blueprint.shapes.values())
    return plan_subject(Subject(name=name, blueprint=blueprint, whole=whole, tokens=tokens), recipe=recipe, **options)


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
) -> Plan:
    """The plan of a block for one recipe.

    tables: where the table is looked for, see `find_table`; without one the search starts from torchao's rule.
    exhaustive: measure every set. workers: processes that compile, 0 for this one alone; None: on a GPU as the cores
    allow. out: a folder for the journal; None keeps none. say: told of every step.
    Raises ValueError for too many roles to be exhaustive about, JournalError, DeviceBusyError, StoppedError when the
    time is up or the GPU slows down, and MemberDiedError; the same call goes on.
    """
    start = time.monotonic()
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    protocol = protocol or make_protocol(device, recipe)
    setup = _setup(subject, recipe, device, protocol)
    roles = [role for role, shape in subject.blueprint.shapes.items() if not shape.indivisible()]
    if not roles:
        raise ValueError("block: expected a linear with dimensions that are multiples of 16; found none")
    if exhaustive and len(roles) > FEW_ROLES:
        raise ValueError(f"exhaustive: expected at most {FEW_ROLES} roles, {2**FEW_ROLES} sets; got {len(roles)}")
    answer = _Answer.of(subject, recipe, setup.device.name, tables, say)
    job = PlanJob(blueprint=subject.blueprint, recipe=recipe, protocol=protocol, device=device)
    if workers is None:
        workers = _useful_workers(subject.blueprint, setup.device.memory_gib) if protocol.compile else 0
    rules = Rules(
        screening=protocol.screening, final=protocol.final, confidence=protocol.confidence, noise=protocol.noise
    )
    with tempfile.TemporaryDirectory() as nowhere, DeviceLock(device):
        with PlanJournal(out or Path(nowhere), setup, fresh=fresh) as journal, BlockWorkerPool(job, workers) as crew:
            say(f"{setup.device.name}: {subject.name}, {recipe}, {len(roles)} roles, {workers} workers, {journal.path}")
            rounds = VisitRounds(crew, journal, subject.blueprint.shapes, say, start=start, stop_after_s=stop_after_s)
            chosen = (search_all if exhaustive else search)(roles, answer.guesses, rounds, rules)
            rounds([BF16_SET], 1)  # it may be all that could be measured
            control = _control(rounds, rules)
            if chosen != BF16_SET and not exceeds_control(gain(rounds.log_ratios(chosen), rules).low, control):
                say(f"bf16 stays: no set gains more than bf16 loaded again, {control and f'{control:.4f}x'}")
                chosen = BF16_SET
            say(rounds.summary())
        return _make_plan(setup, subject, roles, answer, rounds, rules, chosen, control, exhaustive)


def model_subject(model: str, *, tokens: int, sequence: int | None, tp: int, recomputed: bool) -> Subject:
    """A model's decoder layer as one rank holds it; model: a bundled name, or a config.json.

    Raises ModelError or BlockError for a model that cannot be planned, or sizes that do not divide.
    """
    config = load_model(model)
    facts = bundled_facts(config) if model in BUNDLED else msgspec.json.decode(Path(model).read_bytes())
    length = sequence_of(config, tokens, sequence)
    blueprint = Blueprint.of_layer(config, facts, tokens=tokens, sequence=length, tp=tp, recomputed=recomputed)
    roles = {linear.fqn.removeprefix(LAYER): linear for linear in linear_roles(config)}
    return Subject(
        name=model if model in BUNDLED else _name_of(Path(model)),
        blueprint=blueprint,
        whole={role: (roles[role].in_features, roles[role].out_features) for role in blueprint.shapes},
        tokens=tokens,
        sequence=length,
        tp=tp,
    )


def plan_path(
    out: Path, subject: Subject, recipe: Recipe, device: torch.device, emulate_precision_casts: bool | None = None
) -> Path:
    """<out>/<device>/plans/<model>-<recipe>-m<tokens>, and what is not the default."""
    settings = inductor_settings(recipe, emulate_precision_casts)
    parts = [subject.name, recipe, f"m{subject.tokens}"]
    parts += [f"s{subject.sequence}"] if subject.sequence not in (None, subject.tokens) else []
    parts += [f"tp{subject.tp}"] if subject.tp > 1 else []
    parts += ["recomputed"] if subject.blueprint.recomputed else []
    parts += [name for name in settings if name not in RECIPES[recipe].inductor]
    parts += [f"no_{name}" for name in RECIPES[recipe].inductor if name not in settings]
    return out / device_slug(describe_device(device).name) / PLANS / f"{'-'.join(parts)}.yaml"


def make_protocol(device: torch.device, recipe: Recipe, emulate_precision_casts: bool | None = None) -> PlanProtocol:
    """Compiled under CUDA graphs on a GPU, eager on a CPU. emulate_precision_casts: of Inductor; None: as the recipe's
    production has it. Raises ValueError if it is asked for where nothing is compiled.
    """
    if emulate_precision_casts is not None and device.type != "cuda":
        raise ValueError("emulate_precision_casts: a setting of Inductor; on a CPU blocks are not compiled")
    on_gpu = device.type == "cuda"
    return PlanProtocol(
        timer="cuda_graphs" if on_gpu else "wall_clock",
        compile=on_gpu,
        inductor=inductor_settings(recipe, emulate_precision_casts) if on_gpu else {},
        l2="cold",
        data=DATA,
        settle_s=VISIT_SETTLE_S if on_gpu else 0.0,
        run_s=VISIT_RUN_S if on_gpu else CPU_RUN_S,
        pause_s=VISIT_PAUSE_S if on_gpu else 0.0,
        screening=SCREENING,
        final=FINAL,
        confidence=CONFIDENCE,
        noise=NOISE if on_gpu else CPU_NOISE,
        seed=0,
    )


def _useful_workers(blueprint: Blueprint, memory_gib: float) -> int:
    """As many as the machine bears, and the device's memory: each holds a block, its gradients and activations."""
    elements = sum(parameter.numel() for parameter in blueprint.template.parameters())
    elements += sum(shape.m * (shape.k + shape.n) for shape in blueprint.shapes.values())
    tokens = max(shape.m for shape in blueprint.shapes.values())
    for one in blueprint.template.parameters():
        if one.ndim == 3:  # grouped experts
            elements += tokens * min(one.shape[0], MOST_EXPERTS) * (one.shape[1] + one.shape[2])
    needed_gib = WORKER_DEVICE_GIB + COPIES * 2 * elements / 2**30
    return max(1, min(default_workers(memory_gib), int(MAX_DEVICE_SHARE * memory_gib / needed_gib)))


@dataclass(frozen=True, slots=True)
class _Answer:
    """What is known before anything is measured. saved_us: by each role's linears alone, as the table says."""

    table: TableUsed | None
    torchao: tuple[str, ...] | None
    saved_us: dict[str, float]
    guesses: list[RoleSet]

    @classmethod
    def of(
        cls, subject: Subject, recipe: Recipe, device: str, tables: Path | None, say: Callable[[str], None]
    ) -> _Answer:
        shapes = subject.blueprint.shapes
        possible = [role for role, shape in shapes.items() if not shape.indivisible()]
        rule = {role: _torchao(recipe, subject.whole[role]) for role in possible}
        torchao = None if None in rule.values() else tuple(role for role, convert in rule.items() if convert)
        guesses = [frozenset(possible)] if torchao is None else [frozenset(torchao), frozenset(possible)]
        try:
            table, _ = find_table(recipe, device=device, tables=tables)
        except TableError as error:
            say(f"{error}; so the search starts without a table")
            return cls(None, torchao, {}, guesses)
        lookup, recomputed = Lookup(table), subject.blueprint.recomputed
        convert = [
            role
            for role in possible
            if decide(shapes[role], lookup, min_speedup=DEFAULT_MIN_SPEEDUP, recomputed=recomputed).convert
        ]
        counts = Counter(block_role(name) for name, _ in linears_in(subject.blueprint.template))
        saved_us = {role: counts[role] * _saved_us(shapes[role], lookup, recomputed) for role in possible}
        return cls(_used(table, convert), torchao, saved_us, [frozenset(convert), *guesses])

    def predicted(self, candidate: RoleSet, bf16_us: float) -> float | None:
        if self.table is None:
            return None
        return bf16_us / max(bf16_us - sum(self.saved_us[role] for role in candidate), 1.0)


def _name_of(config: Path) -> str:
    """A config.json is named by its folder, as Hugging Face keeps them."""
    return config.absolute().parent.name if config.stem == "config" else config.stem


def _torchao(recipe: Recipe, sizes: tuple[int, int]) -> bool | None:
    return torchao_converts(recipe, in_features=sizes[0], out_features=sizes[1])


def _saved_us(shape: LinearShape, lookup: Lookup, recomputed: bool) -> float:
    estimate = lookup(shape)
    if estimate is None:
        return 0.0
    estimate = estimate.recomputed() if recomputed else estimate
    return estimate.bf16_us - estimate.fp8_us


def _used(table: Table, convert: Sequence[str]) -> TableUsed:
    return TableUsed(
        measured_at=table.measured_at,
        torch=table.software.torch,
        min_speedup=DEFAULT_MIN_SPEEDUP,
        convert=tuple(convert),
    )


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
    answer: _Answer,
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
        indivisible=tuple(role for role in setup.shapes if role not in roles),
        left_alone=grouped_weights(subject.blueprint.template),
        table=answer.table,
        torchao=answer.torchao,
        control=control,
        convert=rounds.in_order(chosen),
        exhaustive=exhaustive,
        candidates=tuple(candidates),
    )


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
