"""Decoder layers under real tensor parallelism: does a plan's order of sets hold with communication?

A plan measures sets of float8 linears inside of a layer as one rank computes it, without communication. This benchmark
runs the model's own layers on as many ranks as torchrun starts, with sequence parallelism, and times the plan's
finalists, its choice, all linears, torchao's rule, the table's answer, bf16, and bf16 again. Without a plan it times
the MLP's linears (w1, w2, w3) too, and with fp8gate's casts the plan's set with Inductor's as well. On a GPU each layer
is compiled as production does, bf16 with Inductor's defaults.

A step is the forward and backward of all layers. A set runs alone on the GPUs in visits: a pause, steps that do not
count until the clock is its own, and then a whole second between two CUDA events on each rank. The slowest rank's time
counts. Each round visits all sets in random order, the same on all ranks, and gains are paired by round. Nothing
flushes the caches: each layer moves many times what they hold.

Every visit is written to a journal at once. The same command goes on from it: rounds that were cut short are measured
again.

Run it: torchrun --nproc-per-node=2 benchmarks/tp_block.py llama3-8b --recipe rowwise --tokens 8192 --out DIR
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from pathlib import Path
from typing import get_args

import torch
from torch.distributed.device_mesh import init_device_mesh
from tp_block_layers import TpLayers, require_llama
from tp_block_output import LEAST_ROUNDS, ConvertedSet, TpJournal, TpSetup, report
from tp_block_rounds import Bench, Ranks
from tp_block_sets import make_sets, plan_of

from fp8gate.calibrate.arms.linear import inductor_settings
from fp8gate.calibrate.device.lock import DeviceLock
from fp8gate.calibrate.device.registry import (
    choose_device,
    describe_device,
    describe_software,
    kind_of,
    require_compiler,
)
from fp8gate.calibrate.planning.subject import Subject, model_subjects
from fp8gate.calibrate.planning.table_answer import TableAnswer
from fp8gate.calibrate.ranks.environment import RankEnvironment
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.plans.plan import Plan
from fp8gate.filter.contract.recipes import RECIPES, Casts, Variant, require_casts

ROUNDS = 10  # with 8 the 99 % bounds would be the least and the largest ratio
SEED = 0
USAGE = "torchrun --nproc-per-node=2 benchmarks/tp_block.py MODEL --recipe RECIPE --tokens TOKENS --out DIR"


def main() -> None:
    arguments = parse()
    try:
        place = RankEnvironment.from_environment()
        if place is None:
            raise InputError(f"ranks: expected to be started by torchrun: {USAGE}")
        run(arguments, place)
    except InputError as error:
        sys.exit(f"{error}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a bundled model, or a config.json; its layers have Llama's linears")
    parser.add_argument("--recipe", choices=RECIPES, required=True)
    parser.add_argument("--tokens", type=int, required=True, help="of the batch that the ranks share")
    parser.add_argument("--out", type=Path, required=True, help="folder for the journal")
    parser.add_argument("--plan", type=Path, help="a plan of the model, recipe and casts, of any degree")
    parser.add_argument(
        "--casts", choices=get_args(Casts), default="inductor", help="who compiles float8's; default: Inductor"
    )
    parser.add_argument("--tables", type=Path, help="a table or folder of tables; default: those of fp8gate")
    parser.add_argument("--layers", type=int, default=3, help="how many a step runs")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"visits of each set, at least {LEAST_ROUNDS}")
    parser.add_argument("--stop-after", type=float, metavar="MIN", help="begin no visit after that many minutes")
    arguments = parser.parse_args()
    for name, least in (("layers", 1), ("rounds", LEAST_ROUNDS), ("tokens", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name}: expected at least {least}; got {getattr(arguments, name)}")
    return arguments


def run(arguments: argparse.Namespace, place: RankEnvironment) -> None:
    start = time.monotonic()
    until = math.inf if arguments.stop_after is None else start + 60 * arguments.stop_after
    device = own_device(place)
    variant = Variant(arguments.recipe, arguments.casts)
    require_casts(*variant)
    if variant.casts != "inductor":
        require_compiler(device, "casts")
    has_lock = kind_of(device).has_own_lock(place.local_rank)
    with DeviceLock(device) if has_lock else contextlib.nullcontext(), Ranks.joined(device) as ranks:

        def say(message: str) -> None:
            if ranks.rank == 0:
                print(f"{time.monotonic() - start:.0f} s: {message}", file=sys.stderr, flush=True)

        whole, part = (only_subject(arguments, tp) for tp in (1, ranks.world))
        plan = plan_of(arguments.plan, part, variant)
        answer = TableAnswer.of(part, variant, describe_device(device).name, arguments.tables, say)
        sets = make_sets(part.possible, answer, plan, variant.casts, say)
        setup = make_setup(arguments, part, device, sets, plan)
        with TpJournal(arguments.out, setup) if ranks.rank == 0 else contextlib.nullcontext() as journal:
            known = ranks.gather(journal.records if journal else None)[0]
            watch = kind_of(device).make_watch(device)
            bench = Bench(setup, ranks, device, until, say, list(known or ()), journal, watch)
            if not bench.is_done(arguments.rounds):
                mesh = init_device_mesh(device.type, (ranks.world,), mesh_dim_names=("tp",))
                layers = TpLayers(whole, mesh, setup.layers, device, setup.seed)
                bench.measure(layers, arguments.rounds)
        if journal:
            print(report(setup, bench.visits))
            say(f"wrote {journal.path}")


def own_device(place: RankEnvironment) -> torch.device:
    device = choose_device(None)
    if device.type != "cuda":
        return device
    if place.local_rank >= torch.cuda.device_count():
        raise InputError(f"ranks: expected a GPU for each; there are {torch.cuda.device_count()}")
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


def only_subject(arguments: argparse.Namespace, tp: int) -> Subject:
    """Raises InputError for a model that has several kinds of layers, or others than Llama's."""
    subjects, problems = model_subjects(
        arguments.model, tokens=arguments.tokens, sequence=None, tp=tp, recomputed=False
    )
    if len(subjects) != 1 or problems:
        found = [subject.layers for subject in subjects]
        raise InputError(f"model: expected layers of one kind; found {found} {'; '.join(problems)}")
    require_llama(subjects[0].blueprint.shapes)
    return subjects[0]


def make_setup(
    arguments: argparse.Namespace,
    subject: Subject,
    device: torch.device,
    sets: tuple[ConvertedSet, ...],
    plan: Plan | None,
) -> TpSetup:
    defaults = kind_of(device).defaults
    return TpSetup(
        model=subject.name,
        recipe=arguments.recipe,
        tokens=arguments.tokens,
        sequence=subject.sequence or arguments.tokens,
        tp=subject.tp,
        layers=arguments.layers,
        device=describe_device(device),
        software=describe_software(device),
        compile=defaults.compiles,
        inductor=inductor_settings(arguments.recipe) if defaults.compiles else {},
        pause_s=defaults.visit_pause_s,
        settle_s=defaults.visit_settle_s,
        run_s=defaults.visit_run_s,
        seed=SEED,
        block=subject.blueprint.identity,
        plan=f"TP {plan.tp}, {plan.tokens} tokens, {plan.device.name}" if plan else "",
        sets=sets,
    )


if __name__ == "__main__":
    main()
