"""What benchmarks/train_titan.py writes, what it reads from torchtitan's log, and the tables made from both.

In: the journal of one setup, a header and then a line for each visit. Out: tokens per second by choice, as Markdown.

Run it: python benchmarks/train_titan_output.py DIR/*.jsonl
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Literal, get_args

import msgspec
from tabulate import tabulate

from fp8gate.filter.contract.table import Device, Software

Widths = Literal["llama3-8b", "llama3-70b", "tiny"]
Recipe = Literal["rowwise", "rowwise_with_gw_hp"]
Recompute = Literal["none", "selective", "full"]
Choice = Literal["bf16", "all", "rule", "rule-shards", "table", "plan"]
Variant = Literal["async TP", "without CUDA graphs", "fp8gate casts"]
"""What some choices are also run with. torchtitan runs forward and backward as one CUDA graph, unless told: then the
host launches each kernel, and gradients are written anew instead of set to zero and added to."""
CASTS: Variant = "fp8gate casts"
LABELS: dict[Choice, str] = {
    "bf16": "bf16",
    "all": "all float8",
    "rule": "torchao's rule, whole linears",
    "rule-shards": "torchao's rule, a rank's shards",
    "table": "fp8gate, table",
    "plan": "fp8gate, plan",
}
LOG_EVERY = 5
"""Steps between two lines of torchtitan's log. For each line it waits for the GPU, by default every 10 steps."""
HEADLINE = (
    "widths",
    "recipe",
    "recomputation",
    "bf16, tokens/s a rank",
    *(LABELS[choice] for choice in ("all", "rule", "rule-shards", "table", "plan")),
    *(f"{who}, {variant}" for variant in get_args(Variant)[:-1] for who in ("bf16", "fp8gate")),
    *(f"{who}, {CASTS}" for who in ("all float8", "fp8gate")),
    "last loss: bf16, fp8gate",
)
HEADERS = ("choice", "float8 linears", "tokens/s a rank", "over bf16", "its visits", "peak GiB", "MFU", "last loss")
_STEP = re.compile(
    r"^(?:\[rank0\]:)?.*step: +(?P<step>\d+) +loss: +(?P<loss>\S+) +grad_norm: +\S+ +memory: +(?P<memory_gib>[\d.]+)GiB"
    r"\S* +tps: +(?P<tokens_per_s>[\d,]+) +tflops: +(?P<tflops>[\d.,]+) +mfu: +(?P<mfu>[\d.]+%|N/A)"
)
_OTHER_RANK = re.compile(r"^\[rank[1-9]\d*\]:")


def choices_with(variant: Variant, best: Choice) -> tuple[Choice, Choice]:
    """The choices that are also run with a variant. best: of fp8gate's.

    bf16 has no casts. The table is that of fp8gate's casts then, and a plan is of Inductor's.
    """
    return ("all", "table") if variant == CASTS else ("bf16", best)


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for every visit.

    tp, fsdp: the degrees; their product is the number of ranks. tokens: of one sequence, the batch of a data parallel
    rank. warm_up: the first steps, which do not count. fused: q, k and v are one linear. tables, plan: files of
    fp8gate, its own tables if None.
    """

    widths: Widths
    layers: int
    tp: int
    fsdp: int
    recipe: Recipe
    recompute: Recompute
    tokens: int
    steps: int
    warm_up: int
    fused: bool
    tables: str | None
    plan: str | None

    @property
    def ranks(self) -> int:
        return self.tp * self.fsdp

    @property
    def name(self) -> str:
        """Names the files of this setup."""
        degree = _degree(self).replace(" ", "").lower()
        recompute = "no-recompute" if self.recompute == "none" else f"{self.recompute}-recompute"
        fused = "" if self.fused else "-unfused"
        size = f"{self.widths}-{self.layers}-layers{fused}-m{self.tokens}"
        return f"titan-{size}-{degree}-{recompute}-{self.recipe}"


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One training run. choices: those that convert the same linears. The run is started with the first of them."""

    choices: tuple[Choice, ...]
    float8: tuple[str, ...]
    variant: Variant | None = None

    @property
    def name(self) -> str:
        return "; ".join([*(LABELS[choice] for choice in self.choices), *([self.variant] if self.variant else [])])


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The first line of a journal. linears: how many the layers have, the head not counted. The first run is bf16."""

    setup: Setup
    visits: int
    linears: int
    device: Device
    software: Software
    runs: tuple[Run, ...]


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """A line of torchtitan's log. tokens_per_s: of one rank, since the line before. mfu: in percent; none in float8."""

    step: int
    loss: float
    memory_gib: float
    tokens_per_s: int
    tflops: float
    mfu: float | None


class Visit(msgspec.Struct, frozen=True, kw_only=True):
    """Every other line.

    round: each round visits all runs. gpus: of the ranks. error: the last line of a visit that failed.
    """

    run: str
    round: int
    gpus: tuple[str, ...]
    wall_s: float
    steps: tuple[Step, ...]
    error: str | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="journals, each written by train_titan.py")
    print(*(report(*read_journal(file)) for file in parser.parse_args().files), sep="\n\n")


def read_steps(log: str) -> tuple[Step, ...]:
    """The steps that rank 0 logged. torchrun's --tee names the rank at the beginning of a line."""
    return tuple(map(_step, filter(None, map(_STEP.match, _lines_of_rank_0(log)))))


def last_words(log: str) -> str:
    """The line that says best why a visit failed: the last one that names an error, else the last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\[rank\d+\]:)*\s*[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or ["nothing was written"])[-1][:300]


def read_journal(file: Path) -> tuple[Header, list[Visit]]:
    """What was measured so far. A last line that was cut off, as its writer was killed, counts as not written."""
    first, *lines = file.read_bytes().split(b"\n")
    return msgspec.json.decode(first, type=Header), [msgspec.json.decode(line, type=Visit) for line in lines[:-1]]


def missing_visits(
    header: Header, visits: Sequence[Visit], gpus: tuple[str, ...] | None = None
) -> Iterator[tuple[Run, int]]:
    """The visits that are to be made, in order. A run that failed is not visited again.

    gpus: those at hand. A round that was begun on others begins again, as gains are over bf16 on the same GPUs. None:
    as many as the fullest begin of each round lacks.
    """
    failed = {visit.run for visit in visits if visit.error}
    for number in range(header.visits):
        by_gpus: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for visit in visits:
            if visit.round == number:
                by_gpus[visit.gpus].add(visit.run)
        done = max(by_gpus.values(), key=len, default=set())
        if gpus is not None and not done | failed >= {run.name for run in header.runs}:
            done = by_gpus[gpus]
        for run in header.runs if number % 2 == 0 else header.runs[::-1]:
            if run.name not in done | failed:
                yield run, number


def headline(files: Iterable[Path]) -> str:
    """A row for each journal: the mean gain of each choice over the bf16 of its round, for the documents.

    Columns without any number are left out.
    """
    columns = zip(HEADLINE, *(_headline_row(*read_journal(file)) for file in files), strict=True)
    headers, *rows = zip(*(column for column in columns if any(column[1:])), strict=True)
    return tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")


def _headline_row(header: Header, visits: Sequence[Visit]) -> tuple[str, ...]:
    setup, bf16 = header.setup, header.runs[0]
    runs = {(choice, run.variant): run for run in header.runs for choice in run.choices}
    gains = {place: _gains(header, run, visits)[0] for place, run in runs.items()}
    best: Choice = "plan" if ("plan", None) in runs else "table"
    losses = (fmean(step.loss for step in _last_steps(header, run, visits)) for run in (bf16, runs[best, None]))
    return (
        f"{setup.widths}, {setup.layers} layers{'' if setup.fused else ', q, k, v apart'}, {_degree(setup)}",
        setup.recipe,
        setup.recompute,
        f"{fmean(_by_round(setup, bf16, visits).values()):.0f}",
        *(gains.get((choice, None), "") for choice in get_args(Choice)[1:]),
        *(gains.get((one, variant), "") for variant in get_args(Variant) for one in choices_with(variant, best)),
        ", ".join(f"{loss:.3f}" for loss in losses),
    )


def report(header: Header, visits: Sequence[Visit]) -> str:
    rows = [_row(header, run, visits) for run in header.runs]
    table = tabulate(rows, headers=HEADERS, disable_numparse=True, tablefmt="github")
    return "\n\n".join([title(header), table, *_remarks(header, visits)])


def title(header: Header) -> str:
    setup, software = header.setup, header.software
    sequence = " with sequence parallelism" if setup.tp > 1 else ""
    qkv = "" if setup.fused else ", q and k and v apart"
    return (
        f"torchtitan, {setup.widths}, {setup.layers} layers{qkv}, {setup.ranks} x {header.device.name}, "
        f"{_degree(setup)}{sequence}, {setup.recompute} recomputation, {setup.tokens} tokens, {setup.recipe}, "
        f"steps {setup.warm_up + 1} to {setup.steps} (torch {software.torch}, torchao {software.torchao})"
    )


def _degree(setup: Setup) -> str:
    return f"TP {setup.tp}" if setup.fsdp == 1 else f"FSDP {setup.fsdp}"


def tokens_per_s(setup: Setup, visit: Visit) -> float | None:
    """Over all steps that count. The lines stand for as many steps each. None if the visit failed."""
    counted = [step.tokens_per_s for step in visit.steps if step.step > setup.warm_up]
    return harmonic_mean(counted) if counted and visit.error is None else None


def _step(match: re.Match[str]) -> Step:
    mfu = match["mfu"]
    return Step(
        step=int(match["step"]),
        loss=float(match["loss"]),
        memory_gib=float(match["memory_gib"]),
        tokens_per_s=int(match["tokens_per_s"].replace(",", "")),
        tflops=float(match["tflops"].replace(",", "")),
        mfu=None if mfu == "N/A" else float(mfu.removesuffix("%")),
    )


def _lines_of_rank_0(log: str) -> Iterator[str]:
    return (line for line in log.splitlines() if not _OTHER_RANK.match(line))


def _row(header: Header, run: Run, visits: Sequence[Visit]) -> tuple[str, ...]:
    speeds = _by_round(header.setup, run, visits)
    last = _last_steps(header, run, visits)
    mfus = [step.mfu for step in last if step.mfu is not None]
    return (
        run.name,
        f"{len(run.float8)} of {header.linears}",
        f"{fmean(speeds.values()):.0f}" if speeds else "",
        *_gains(header, run, visits),
        f"{max(step.memory_gib for step in last):.1f}" if last else "",
        f"{fmean(mfus):.1f}%" if mfus else "",
        f"{fmean(step.loss for step in last):.4f}" if last else "",
    )


def _last_steps(header: Header, run: Run, visits: Sequence[Visit]) -> list[Step]:
    """Of each visit that did not fail."""
    speeds = _by_round(header.setup, run, visits)
    return [visit.steps[-1] for visit in visits if visit.run == run.name and (visit.round, visit.gpus) in speeds]


def _by_round(setup: Setup, run: Run, visits: Sequence[Visit]) -> dict[tuple[int, tuple[str, ...]], float]:
    """Tokens per second of a run's visits, by round and GPUs."""
    found = {(visit.round, visit.gpus): tokens_per_s(setup, visit) for visit in visits if visit.run == run.name}
    return {place: speed for place, speed in found.items() if speed is not None}


def _gains(header: Header, run: Run, visits: Sequence[Visit]) -> tuple[str, str]:
    """The gain in tokens per second over bf16 of the same round and GPUs: its mean, and each.

    bf16: each over their mean.
    """
    speeds, bf16 = (_by_round(header.setup, each, visits) for each in (run, header.runs[0]))
    if run == header.runs[0]:
        bf16 = dict.fromkeys(bf16, fmean(bf16.values())) if bf16 else {}
    gains = [speed / bf16[place] - 1 for place, speed in sorted(speeds.items()) if place in bf16]
    if not gains:
        return "", ""
    mean = "" if run == header.runs[0] else f"{fmean(gains):+.1%}"
    return mean, ", ".join(f"{gain:+.1%}" for gain in gains)


def _remarks(header: Header, visits: Sequence[Visit]) -> Iterator[str]:
    bf16 = _by_round(header.setup, header.runs[0], visits).values()
    if len(bf16) > 1:
        yield f"bf16 against itself: its visits differ by {max(bf16) / min(bf16) - 1:.1%}"
    if missing := len(list(missing_visits(header, visits))):
        yield f"not measured yet: {missing} of {header.visits * len(header.runs)} visits"
    for visit in visits:
        if visit.error:
            yield f"failed: {visit.run}, visit {visit.round + 1}: {visit.error}"


if __name__ == "__main__":
    main()
