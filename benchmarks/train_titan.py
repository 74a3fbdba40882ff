"""Train Llama in torchtitan on several GPUs: what each choice of float8 linears gains in tokens per second.

Each visit is one run of torchtitan's own Trainer under torchrun: Llama 3 widths with as many layers as asked for, real
steps with AdamW, and torchtitan's own metrics, read from its log. The choices are bf16; all float8; torchao's rule,
asked about whole linears and about a rank's shards; fp8gate by its table; fp8gate by a plan. bf16 and the plan, or else
the table, also run with async TP, under tensor parallelism, and without CUDA graphs (--variants). All float8, and
fp8gate by the table of fp8gate's casts if there is one, also run with these casts. The head stays in bf16. Choices that
convert the same linears are one run. A round visits each run once, and every other round goes backwards, so that a
drift of the GPUs is the same for all. Gains are over the bf16 of the same round. Each visit compiles; from the second
round on, compilers find the kernels of the first one in the cache.

Every visit is written into the journal as soon as it is done. --stop-after ends the command in time, and the same
command goes on from the journal. torchtitan's logs of all visits are kept in one file beside it.

Run it: python benchmarks/train_titan.py --widths llama3-8b --tp 2 --recipe rowwise --plan PLAN --out DIR
Only bf16 and the table's set, in another folder, as a journal keeps to its choices:
python benchmarks/train_titan.py --widths llama3-8b --tp 2 --recipe rowwise --choices table --variants --out OTHER_DIR
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, get_args

import msgspec
from train_titan_journal import Journal, append, lines_of, visits_of
from train_titan_output import (
    LOG_EVERY,
    Choice,
    Header,
    Recipe,
    Recompute,
    Run,
    Setup,
    Variant,
    Visit,
    Widths,
    last_words,
    missing_visits,
    read_steps,
    report,
)
from train_titan_runs import runs_of
from train_titan_trace import StepTrace
from train_titan_trace import report as report_traces

from fp8gate.filter.contract.table import Device, Software

RANK = Path(__file__).with_name("train_titan_rank.py")
LAYERS: dict[Widths, int] = {"llama3-8b": 16, "llama3-70b": 4, "tiny": 2}
"""By default. Each of two 80 GB GPUs holds its half of the parameters, and the activations of 8192 tokens."""
VISIT_LIMIT_S = 240.0
"""For a visit that compiles anew. A longer one has hung."""
END_LIMIT_S = 60.0  # torchrun kills its ranks 30 s after it was told to end


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """What train_titan_rank.py --list writes."""

    float8: dict[Choice, tuple[str, ...]]
    with_casts: dict[Choice, tuple[str, ...]] = {}  # of fp8gate; empty for a recipe that they are not for
    linears: int
    device: Device
    gpus: tuple[str, ...]
    software: Software


def main() -> None:
    arguments = parse()
    stop_at = time.monotonic() + arguments.stop_after * 60 if arguments.stop_after else None
    setup = setup_of(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    journal = Journal.of(setup, arguments.out)
    listing = list_choices(setup)
    header = header_of(setup, listing, arguments.choices, arguments.visits, arguments.variants)
    if arguments.trace:
        trace_runs(setup, header, journal.log, stop_at)
        return
    visits = visits_of(journal, header)
    while missing := next(missing_visits(header, visits, listing.gpus), None):
        if is_too_late(stop_at, visits):
            break
        run, number = missing
        visit = make_visit(setup, run, number, listing.gpus, journal.log, stop_at)
        if visit is None:
            break
        append(journal.visits, visit)
        visits.append(visit)
        say(f"{run.name}, visit {number + 1}: {visit.error or described(setup, visit)} ({visit.wall_s:.0f} s)")
    print(report(header, visits))
    say(f"wrote {journal.visits} and {journal.log}; the same command goes on with what is missing")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setup_options(parser)
    add_comparison_options(parser)
    arguments = parser.parse_args()
    whole = arguments.steps % LOG_EVERY == arguments.warm_up % LOG_EVERY == 0
    if not whole or not 0 < arguments.warm_up < arguments.steps:
        parser.error(f"--steps, --warm-up: expected multiples of {LOG_EVERY}, and fewer of warm-up than of all")
    return arguments


def add_setup_options(parser: argparse.ArgumentParser) -> None:
    """What is trained, as `Setup` has it."""
    parser.add_argument("--widths", choices=get_args(Widths), required=True)
    layers = ", ".join(f"{count} for {widths}" for widths, count in LAYERS.items())
    parser.add_argument("--layers", type=int, help=f"default: {layers}")
    degree = parser.add_mutually_exclusive_group(required=True)
    degree.add_argument(
        "--tp", type=int, default=1, help="tensor parallel degree, with sequence parallelism; 1 by default"
    )
    degree.add_argument("--fsdp", type=int, default=1, help="over how many ranks parameters are sharded; 1 by default")
    parser.add_argument(
        "--recompute",
        choices=get_args(Recompute),
        default="selective",
        help="which forwards run again in the backward; default: %(default)s",
    )
    parser.add_argument("--recipe", choices=get_args(Recipe), required=True)
    parser.add_argument("--unfused", action="store_true", help="q, k and v are linears of their own; by default one")
    parser.add_argument(
        "--tokens",
        type=int,
        default=8192,
        help="of a sequence, one of which a data parallel rank has; default: %(default)s",
    )
    parser.add_argument(
        "--steps", type=int, default=40, help=f"of a visit, a multiple of {LOG_EVERY}; default: %(default)s"
    )
    parser.add_argument(
        "--warm-up",
        type=int,
        default=15,
        help=f"the first steps, which do not count; a multiple of {LOG_EVERY}; default: %(default)s",
    )
    parser.add_argument("--tables", type=Path, help="a table or folder of tables; default: those of fp8gate")
    parser.add_argument("--plan", type=Path, help="a plan's file; default: none, and that choice is left out")


def add_comparison_options(parser: argparse.ArgumentParser) -> None:
    """What is compared, how often, and where it is written."""
    parser.add_argument(
        "--visits", type=int, default=2, help="to each choice, an even number for a fair order; default: %(default)s"
    )
    parser.add_argument(
        "--choices",
        nargs="+",
        choices=get_args(Choice),
        default=get_args(Choice),
        help="what to compare with bf16, which always runs; default: all",
    )
    parser.add_argument(
        "--variants",
        nargs="*",
        choices=get_args(Variant),
        default=get_args(Variant),
        help="what some choices are also run with; without a name, with none; default: all",
    )
    parser.add_argument(
        "--trace",
        action="store_true",
        help="instead of timing, trace each run once: which kernels its steps consist of",
    )
    parser.add_argument("--stop-after", type=float, metavar="MINUTES", help="end by then; default: after all visits")
    parser.add_argument("--out", type=Path, required=True, help="folder of the journals and logs")


def setup_of(arguments: argparse.Namespace) -> Setup:
    tables, plan = (str(path) if path else None for path in (arguments.tables, arguments.plan))
    return Setup(
        widths=arguments.widths,
        layers=arguments.layers or LAYERS[arguments.widths],
        tp=arguments.tp,
        fsdp=arguments.fsdp,
        recipe=arguments.recipe,
        recompute=arguments.recompute,
        tokens=arguments.tokens,
        steps=arguments.steps,
        warm_up=arguments.warm_up,
        fused=not arguments.unfused,
        tables=tables,
        plan=plan,
    )


def list_choices(setup: Setup) -> Listing:
    """Ask a process of its own, which then frees the GPU. Raises CalledProcessError if a choice cannot be made."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "listing.json"
        given = msgspec.json.encode(setup).decode()
        subprocess.run([sys.executable, RANK, given, "--list", file], check=True, stdout=subprocess.DEVNULL)
        return msgspec.json.decode(file.read_bytes(), type=Listing)


def header_of(
    setup: Setup, listing: Listing, choices: Sequence[Choice], visits: int, variants: Sequence[Variant]
) -> Header:
    possible = variants if listing.device.kind == "cuda" else ()
    asked = {choice: names for choice, names in listing.float8.items() if choice == "bf16" or choice in choices}
    return Header(
        setup=setup,
        visits=visits,
        linears=listing.linears,
        device=listing.device,
        software=listing.software,
        runs=runs_of(
            asked, [variant for variant in possible if setup.tp > 1 or variant != "async TP"], listing.with_casts
        ),
    )


def is_too_late(stop_at: float | None, visits: Sequence[Visit]) -> bool:
    """Whether another visit might not end in time, if it takes as long as the longest so far."""
    return stop_at is not None and time.monotonic() + max((visit.wall_s for visit in visits), default=0.0) > stop_at


def time_limit_s(start: float, stop_at: float | None) -> float:
    """Of one training run, which the end of the command may cut short. Both are of `time.monotonic`."""
    return VISIT_LIMIT_S if stop_at is None else min(VISIT_LIMIT_S, stop_at - start)


def make_visit(
    setup: Setup, run: Run, number: int, gpus: tuple[str, ...], log: Path, stop_at: float | None
) -> Visit | None:
    """Train once. None if --stop-after ended it."""
    start = time.monotonic()
    limit_s = time_limit_s(start, stop_at)
    with open(log, "ab+") as file:
        file.write(f"\n=== {run.name}, visit {number + 1}\n".encode())
        file.flush()
        begin = file.seek(0, os.SEEK_END)
        code = train(setup, run, file, limit_s)
        file.seek(begin)
        said = file.read().decode(errors="replace")
    wall_s = round(time.monotonic() - start, 1)
    if code is None and limit_s < VISIT_LIMIT_S:
        return None
    steps = read_steps(said)
    error = None if code == 0 and steps else f"{'hung' if code is None else last_words(said)}"
    return Visit(run=run.name, round=number, gpus=gpus, wall_s=wall_s, steps=steps, error=error)


def train(setup: Setup, run: Run, log: IO[bytes], limit_s: float, *more: str) -> int | None:
    """The exit code of torchrun, None if it was ended because the time was over."""
    rank = [str(RANK), msgspec.json.encode(setup).decode(), "--choice", run.choices[0]]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(setup.ranks), "--role", "rank"]
    variant = ["--variant", run.variant] if run.variant else []
    command = [sys.executable, "-m", *torchrun, "--tee", "3", *rank, *variant, *more]
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment())
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait(END_LIMIT_S)
        return None


def environment() -> dict[str, str]:
    """That of this process, with one thread for each rank's operators, and caches that outlive a visit."""
    caches = Path(tempfile.gettempdir()) / "train-titan-caches"
    own = {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton")}
    return {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **own, **os.environ}


def trace_runs(setup: Setup, header: Header, log: Path, stop_at: float | None) -> None:
    """Trace each run, print where its steps go, and write it beside the journal. What was written is not run again.

    Raises SystemExit if what was written is of something else.
    """
    written = log.with_name(f"{setup.name}-traces.jsonl")
    traces = [msgspec.json.decode(line, type=StepTrace) for line in lines_of(written, header)]
    for run in header.runs:
        if any(trace.run == run.name for trace in traces):
            continue
        start = time.monotonic()
        limit_s = time_limit_s(start, stop_at)
        with tempfile.TemporaryDirectory() as folder, open(log, "ab") as file:
            result = Path(folder) / "trace.json"
            code = train(setup, run, file, limit_s, "--trace", str(result)) if limit_s > 0 else None
            if code != 0:
                say(f"{run.name}: {'the time is up' if code is None else f'failed, see {log}'}")
                continue
            trace = msgspec.structs.replace(msgspec.json.decode(result.read_bytes(), type=StepTrace), run=run.name)
        append(written, trace)
        traces.append(trace)
        say(f"{run.name}: traced ({time.monotonic() - start:.0f} s)")
    print(report_traces(traces))


def described(setup: Setup, visit: Visit) -> str:
    counted = [step for step in visit.steps if step.step > setup.warm_up]
    return ", ".join(f"{step.tokens_per_s}" for step in counted) + " tokens/s a rank"


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
