"""A decoder layer under settings of Inductor and functorch: does one of them make float8 faster?

Float8 casts are compiled by Inductor, and the backward pass computes again what functorch does not let it save. This
benchmark compiles a layer with a set of its linears in float8 under each setting that could change that, one at a time,
beside what production compiles it with, and bf16. The kernels of fp8gate.casts are one of these settings. All linears
are converted, and those of the committed plan of this GPU, or of an H100 or H200, if there is one. Then it tries the
settings that gain beyond the noise together. A setting that the installed torch does not have is skipped, and named.

All is measured as `fp8gate plan` does: compiled ahead by several processes, captured in CUDA graphs, visited alone on
the GPU, in rounds of random order. Gains are paired by round. On a CPU nothing is compiled, so that no setting matters.

Every visit is written to a journal at once; the same command goes on from it. With --cache, what was compiled is kept
for it too. With --settings, only these are measured beside production and bf16: so the work can be divided into short
calls of one journal. "A + B" is both at once.

Run it: python benchmarks/block_settings.py llama3-8b --recipe rowwise --tokens 8192 --out DIR

What could repair rowwise's casts, by short calls that share a journal and a cache, what tunes for long in the last:
    CASTS='--recipe rowwise --tokens 8192 --sets all --rounds 6 --out DIR --cache DIR/cache'
    python benchmarks/block_settings.py llama3-8b $CASTS --settings loop_ordering_after_fusion fp8gate.casts
    python benchmarks/block_settings.py llama3-8b $CASTS --settings triton.max_tiles \
        "loop_ordering_after_fusion + fp8gate.casts"
    python benchmarks/block_settings.py llama3-8b $CASTS --settings coordinate_descent_tuning
The same with --tp 2, and with llama3-70b --tp 8. On several GPUs, each with a layer: CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from block_settings_bench import SettingsJob, SettingsPool
from block_settings_list import AGAIN, KnownSettings, Names, is_slow
from block_settings_output import LEAST_ROUNDS, Measured, SettingsJournal, SettingsSetup, report
from block_settings_rounds import SettingRounds, variants_of

from fp8gate.calibrate.device.lock import DeviceLock
from fp8gate.calibrate.device.registry import choose_device, describe_device, describe_software
from fp8gate.calibrate.planning.plan_protocol import make_protocol, useful_block_workers
from fp8gate.calibrate.planning.search import CONTROL_SET
from fp8gate.calibrate.planning.subject import Subject, model_subjects
from fp8gate.filter.contract.errors import InputError, UnfinishedError
from fp8gate.filter.contract.plans.plan import Plan
from fp8gate.filter.contract.recipes import RECIPES, Recipe, Variant
from fp8gate.filter.locate.find_plan import find_plans

ROUNDS = 8
ALL, PLAN = "all", "plan"
PLANNED_ON = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
"""A layer that was not planned on this device may have been planned on one of these."""


def main() -> None:
    try:
        run(parse())
    except (InputError, UnfinishedError) as error:
        sys.exit(f"{error}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a bundled model, or a config.json")
    parser.add_argument("--recipe", choices=RECIPES, required=True)
    parser.add_argument("--tokens", type=int, required=True, help="of one rank's batch")
    parser.add_argument("--tp", type=int, default=1, help="ranks that divide the layer, of which one is measured")
    parser.add_argument("--out", type=Path, required=True, help="folder for the journal")
    parser.add_argument("--cache", type=Path, help="folder for what is compiled; default: one that goes at the end")
    parser.add_argument(
        "--sets", nargs="+", default=(ALL, PLAN), metavar="SET", help='"all", "plan", or a,b,c of roles'
    )
    parser.add_argument("--settings", nargs="+", metavar="NAME", help='only these, such as triton.max_tiles or "A + B"')
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"visits of each, at least {LEAST_ROUNDS}")
    parser.add_argument("--workers", type=int, help="processes that compile; default: as many as `fp8gate plan` uses")
    parser.add_argument("--device", help="such as cpu; default: the GPU if there is one")
    parser.add_argument("--stop-after", type=float, metavar="MIN", help="begin no step after that many minutes")
    found = parser.parse_args(arguments)
    for name, least in (("tokens", 1), ("tp", 1), ("rounds", LEAST_ROUNDS)):
        if getattr(found, name) < least:
            parser.error(f"--{name}: expected at least {least}; got {getattr(found, name)}")
    return found


def run(arguments: argparse.Namespace) -> None:
    """Raises InputError for what cannot be measured, StoppedError when the time is up; the report is printed anyway."""
    start = time.monotonic()
    until = math.inf if arguments.stop_after is None else start + 60 * arguments.stop_after
    device, known = choose_device(arguments.device), KnownSettings.of_torch()
    asked = known.named(arguments.settings)
    subject = only_subject(arguments)
    sets = sets_of(arguments.sets, subject, find_plan(subject, arguments.recipe, device), say)
    setup = make_setup(subject, arguments.recipe, device, known)
    for skipped in setup.skipped:
        say(f"skipped: {skipped}")
    with (
        tempfile.TemporaryDirectory() as nowhere,
        DeviceLock(device),
        SettingsJournal(arguments.out, setup) as journal,
    ):
        job = SettingsJob(
            blueprint=subject.blueprint,
            recipe=arguments.recipe,
            protocol=setup.protocol,
            device=device,
            cache=arguments.cache or Path(nowhere),
        )
        workers = arguments.workers
        if workers is None:
            workers = useful_block_workers(subject.blueprint, setup.device, setup.protocol)
        try:
            pool = SettingsPool(job, workers, until=until)
            with pool:
                rounds = SettingRounds(pool, journal, setup.shapes, known, say, start=start, until=until)
                measure_alone(rounds, sets, asked, arguments.rounds)
                if arguments.settings:
                    say("only the settings that were asked for are measured")
                else:
                    measure_together(rounds, known, sets, arguments.rounds)
                say(rounds.summary())
        finally:
            print(report(setup, journal.records))
            say(f"wrote {journal.path}")


def measure_alone(
    rounds: SettingRounds, sets: Mapping[str, tuple[str, ...]], candidates: Sequence[Names], visits: int
) -> None:
    """Each setting by itself. A round begins when all are ready, so those that tune for long have their own rounds."""
    quick = [one for one in candidates if not is_slow(one)]
    slow = [one for one in candidates if is_slow(one)]
    rounds([CONTROL_SET, *variants_of(sets, [(), (AGAIN,), *quick])], visits)
    rounds(variants_of(sets, slow), visits)


def measure_together(
    rounds: SettingRounds, known: KnownSettings, sets: Mapping[str, tuple[str, ...]], visits: int
) -> None:
    """For each set, the settings that gain beyond the noise, all on at once."""
    measured = Measured.of(rounds.journal.setup, rounds.journal.records)
    wanted = []
    for name, roles in sets.items():
        if together := measured.best_together(frozenset(roles), known.candidates):
            wanted.append(together)
        else:
            say(f"{name}: fewer than two settings gain beyond the noise, so nothing is tried together")
    if wanted:
        rounds(wanted, visits)


def only_subject(arguments: argparse.Namespace) -> Subject:
    """Raises InputError for a model that has several kinds of layers."""
    subjects, problems = model_subjects(
        arguments.model, tokens=arguments.tokens, sequence=None, tp=arguments.tp, recomputed=False
    )
    if len(subjects) != 1 or problems:
        found = [subject.layers for subject in subjects]
        raise InputError(f"model: expected layers of one kind; found {found} {'; '.join(problems)}")
    return subjects[0]


def find_plan(subject: Subject, recipe: Recipe, device: torch.device) -> Plan | None:
    """The newest committed plan of the layer, of this device if there is one, else of those that were planned on."""
    for name in dict.fromkeys([describe_device(device).name, *PLANNED_ON]):
        for found in find_plans(device=name, variant=Variant(recipe), tokens=subject.tokens).plans:
            plan = found.plans[0]
            same = (plan.model, plan.tp, plan.recompute) == (subject.name, subject.tp, "none")
            if same and len(found.plans) == 1 and {*plan.convert} <= {*subject.possible}:
                return plan
    return None


def sets_of(
    wanted: tuple[str, ...], subject: Subject, plan: Plan | None, say: Callable[[str], None]
) -> dict[str, tuple[str, ...]]:
    """The roles of each set, none twice. Raises InputError for a role that the layer does not have."""
    sets: dict[str, tuple[str, ...]] = {}
    for name in wanted:
        if name == PLAN and plan is None:
            say("plan: none of this layer, recipe and number of tokens is committed, left out")
            continue
        if name == PLAN and plan:
            say(f"plan: of {plan.device.name}, converts {', '.join(plan.convert) or 'nothing'}")
        roles = _roles(name, subject, plan)
        if roles and roles not in sets.values():
            sets[name] = roles
    return sets


def _roles(name: str, subject: Subject, plan: Plan | None) -> tuple[str, ...]:
    if name == PLAN:
        return plan.convert if plan else ()
    if name == ALL:
        return subject.possible
    short = {role.rpartition(".")[2]: role for role in subject.possible}
    asked = [short.get(part, part) for part in name.split(",")]
    if unknown := [part for part in asked if part not in subject.possible]:
        raise InputError(f"--sets: expected roles among {', '.join(subject.possible)}; got {unknown[0]}")
    return tuple(role for role in subject.possible if role in asked)


def make_setup(subject: Subject, recipe: str, device: torch.device, known: KnownSettings) -> SettingsSetup:
    return SettingsSetup(
        recipe=recipe,  # type: ignore[arg-type]
        model=subject.name,
        tokens=subject.tokens,
        sequence=subject.sequence,
        tp=subject.tp,
        recompute="none",
        device=describe_device(device),
        software=describe_software(device),
        protocol=make_protocol(device, recipe),  # type: ignore[arg-type]
        block=subject.blueprint.identity,
        shapes={role: (shape.m, shape.k, shape.n) for role, shape in subject.blueprint.shapes.items()},
        skipped=known.skipped,
    )


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
