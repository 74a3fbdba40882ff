"""The lines that benchmarks/train_llama.py writes, and the tables made from them, as Markdown.

In: one file of lines for each recipe. Out: the gains, the losses, and whether a float8 loss is beyond the noise.

Run it: python benchmarks/train_llama_output.py benchmarks/data/train-llama/*.jsonl
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

import msgspec
from tabulate import tabulate

from fp8gate.calibrate.timing.statistics import paired_speedup
from fp8gate.filter.contract.recipes import Casts, Recipe
from fp8gate.filter.contract.table import Device, Software

ROUNDS, CONFIDENCE = 16, 0.99  # 8 rounds would be enough, but their bounds would be the least and the largest ratio
PARTS = 8  # the mean loss is shown for each of so many parts of the steps
LAST = 0.25  # the share of the steps, at the end, whose mean loss is compared
RULE = "torchao's rule"
HEADERS = ("choice", "float8 linears", "tokens/s", "over bf16", f"over {RULE}", "peak GiB", "loss")
STUDENT_T = 4.303  # 95 %, two-sided, for three trainings in bf16


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One training run. name: the choices that convert these linears. weights: the seed of the initial weights.

    casts: who compiles those of float8.
    """

    name: str
    float8: tuple[str, ...]
    weights: int = 0
    casts: Casts = "inductor"


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The first line that the benchmark writes. runs: the first is bf16, and the others are compared with it."""

    model: str
    recipe: Recipe
    layers: int
    tokens: int
    steps: int
    device: Device
    software: Software
    runs: tuple[Run, ...]


class Visit(msgspec.Struct, frozen=True, kw_only=True):
    """Every other line. step_s: the mean over the steps that count. losses: those of all steps.

    peak_gib: the peak memory, less what the other models keep on the device.
    """

    run: str
    round: int
    step_s: float
    losses: tuple[float, ...]
    peak_gib: float | None
    sm_clock_mhz: int | None
    slowdown: str | None


Visits = Mapping[str, Sequence[Visit]]
"""The visits of each run by its name, in the order of the rounds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="each written by one train_llama.py")
    files = parser.parse_args().files
    print(*(report(*read_last_benchmark(file)) for file in files), headline(files), sep="\n\n")


def read_last_benchmark(file: Path) -> tuple[Header, Visits]:
    """What train_llama.py wrote last into a file. Raises msgspec.DecodeError for any other file."""
    lines = file.read_bytes().splitlines()
    start = max(i for i, line in enumerate(lines) if b'"runs":' in line)
    visits: dict[str, list[Visit]] = defaultdict(list)
    for line in lines[start + 1 :]:
        visit = msgspec.json.decode(line, type=Visit)
        visits[visit.run].append(visit)
    return msgspec.json.decode(lines[start], type=Header), visits


def headline(files: Iterable[Path]) -> str:
    """The choices of several files in one table, without the runs of bf16 from other weights.

    Columns without any text are left out.
    """
    found = []
    for header, visits in map(read_last_benchmark, files):
        found += [(header.recipe, *_row(header, run, visits)) for run in header.runs if not run.weights]
    columns = zip(("recipe", *HEADERS), *found, strict=True)
    headers, *rows = zip(*(column for column in columns if any(column[1:])), strict=True)
    return tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")


def report(header: Header, visits: Visits) -> str:
    """The gains with 99 % bounds, how far apart the last losses are, and how the losses went."""
    losses = {run.name: last_loss(header, visits[run.name]) for run in header.runs}
    return "\n\n".join([title(header), gains(header, visits), verdict(header, losses), curves(header, visits)])


def title(header: Header) -> str:
    software = header.software
    return (
        f"{header.model}, {header.layers} layers, {header.tokens} tokens, {header.steps} steps, {header.recipe}, "
        f"{header.device.name} (torch {software.torch}, torchao {software.torchao})"
    )


def last_loss(header: Header, visits: Sequence[Visit]) -> float:
    return fmean(_losses(visits)[-round(LAST * header.steps) :])


def gains(header: Header, visits: Visits) -> str:
    rows = [_row(header, run, visits) for run in header.runs]
    return tabulate(rows, headers=HEADERS, disable_numparse=True, tablefmt="github")


def verdict(header: Header, losses: Mapping[str, float]) -> str:
    """Say whether another training in bf16 might have had the float8 losses (95 % prediction interval)."""
    bf16 = [losses[run.name] for run in header.runs if not run.float8]
    mean, reach = fmean(bf16), STUDENT_T * stdev(bf16) * math.sqrt(1 + 1 / len(bf16))
    beyond = [run.name for run in header.runs if run.float8 and abs(losses[run.name] - mean) > reach]
    found = f"beyond that: {'; '.join(beyond)}" if beyond else "so do all in float8"
    return f"bf16 from {len(bf16)} different weights: {mean:.4f}, another would lie within {reach:.4f} (95%); {found}"


def curves(header: Header, visits: Visits) -> str:
    """The mean loss over each eighth of the steps."""
    steps = header.steps // PARTS
    starts = [i * steps for i in range(PARTS)]
    headers = ("loss, steps", *(f"{start + 1} to {start + steps}" for start in starts))
    losses = {run.name: _losses(visits[run.name]) for run in header.runs}
    rows = [
        (name, *(f"{fmean(by_step[start : start + steps]):.4f}" for start in starts))
        for name, by_step in losses.items()
    ]
    return tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")


def _row(header: Header, run: Run, visits: Visits) -> tuple[str, ...]:
    peaks = [visit.peak_gib for visit in visits[run.name] if visit.peak_gib is not None]
    return (
        run.name,
        str(len(run.float8)),
        f"{header.tokens / fmean(_step_s(visits[run.name])):.0f}",
        _gain(header.runs[0], run, visits),
        _gain(next((other for other in header.runs if RULE in other.name), None), run, visits),
        f"{max(peaks):.1f}" if peaks else "",
        f"{last_loss(header, visits[run.name]):.4f}",
    )


def _gain(over: Run | None, run: Run, visits: Visits) -> str:
    """The gain in tokens per second over another run, with bounds. Empty for the run itself or without another."""
    if over in (None, run):
        return ""
    gain = paired_speedup(_step_s(visits[over.name]), _step_s(visits[run.name]), confidence=CONFIDENCE)
    return f"{gain.estimate - 1:+.1%} ({gain.low - 1:+.1%} to {gain.high - 1:+.1%})"


def _losses(visits: Sequence[Visit]) -> list[float]:
    return [loss for visit in visits for loss in visit.losses]


def _step_s(visits: Sequence[Visit]) -> list[float]:
    return [visit.step_s for visit in visits]


if __name__ == "__main__":
    main()
