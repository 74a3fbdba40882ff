"""What benchmarks/train_llama.py writes as it goes, and what it comes to: tables for people, as Markdown. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import msgspec
from tabulate import tabulate

from fp8gate.calibrate.statistics import paired_speedup
from fp8gate.filter.table import Device, Recipe, Software

ROUNDS, CONFIDENCE = 8, 0.99  # the fewest that give such bounds
LAST = 0.25  # of the steps: their mean loss is compared
STUDENT_T = 4.303  # 95 %, two-sided, of three trainings in bf16


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A model to train. name: of the choices that convert these linears. weights: the seed they come from."""

    name: str
    float8: tuple[str, ...]
    weights: int = 0


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The first line of a run of the benchmark. runs: the first is bf16, which the others are compared with."""

    model: str
    recipe: Recipe
    layers: int
    tokens: int
    steps: int
    device: Device
    software: Software
    runs: tuple[Run, ...]


class Visit(msgspec.Struct, frozen=True, kw_only=True):
    """Another line. step_s: mean of the steps that count. losses: of all. peak_gib: as if no other model were there."""

    run: str
    round: int
    step_s: float
    losses: tuple[float, ...]
    peak_gib: float | None
    sm_clock_mhz: int | None
    slowdown: str | None


Visits = Mapping[str, Sequence[Visit]]  # by run, in the order of rounds


def report(header: Header, visits: Visits) -> str:
    """The gains, how far apart the losses are, and the losses on the way."""
    losses = {run.name: last_loss(header, visits[run.name]) for run in header.runs}
    return "\n\n".join([title(header), gains(header, visits, losses), verdict(header, losses), curves(header, visits)])


def title(header: Header) -> str:
    software = header.software
    return (
        f"{header.model}, {header.layers} layers, {header.tokens} tokens, {header.steps} steps, {header.recipe}, "
        f"{header.device.name} (torch {software.torch}, torchao {software.torchao})"
    )


def last_loss(header: Header, visits: Sequence[Visit]) -> float:
    losses = [loss for visit in visits for loss in visit.losses]
    return fmean(losses[-round(LAST * header.steps) :])


def gains(header: Header, visits: Visits, losses: Mapping[str, float]) -> str:
    bf16, *others = header.runs
    rows = [(*_row(header, bf16, visits), "", "", f"{losses[bf16.name]:.4f}", "")]
    for run in others:
        gain = paired_speedup(_step_s(visits[bf16.name]), _step_s(visits[run.name]), confidence=CONFIDENCE)
        bounds = f"{gain.low - 1:+.1%} to {gain.high - 1:+.1%}"
        apart = f"{losses[run.name] - losses[bf16.name]:+.4f}"
        rows.append((*_row(header, run, visits), f"{gain.estimate - 1:+.1%}", bounds, f"{losses[run.name]:.4f}", apart))
    headers = ("", "float8 linears", "peak GiB", "tokens/s", "gain", f"bounds ({CONFIDENCE:.0%})", "loss", "to bf16's")
    return tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")


def verdict(header: Header, losses: Mapping[str, float]) -> str:
    """Whether a float8 loss is one that another training in bf16 might have had (95 % prediction interval)."""
    bf16 = [losses[run.name] for run in header.runs if not run.float8]
    mean, reach = fmean(bf16), STUDENT_T * stdev(bf16) * math.sqrt(1 + 1 / len(bf16))
    beyond = [run.name for run in header.runs if run.float8 and abs(losses[run.name] - mean) > reach]
    found = f"beyond that: {'; '.join(beyond)}" if beyond else "so do all in float8"
    return f"bf16 from {len(bf16)} different weights: {mean:.4f}, another would lie within {reach:.4f} (95%); {found}"


def curves(header: Header, visits: Visits) -> str:
    """The mean loss of each visit."""
    steps = header.steps // ROUNDS
    headers = ("loss, steps", *(f"{i * steps + 1} to {(i + 1) * steps}" for i in range(ROUNDS)))
    rows = [(run.name, *(f"{fmean(visit.losses):.4f}" for visit in visits[run.name])) for run in header.runs]
    return tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")


def _row(header: Header, run: Run, visits: Visits) -> tuple[str, str, str, str]:
    peaks = [visit.peak_gib for visit in visits[run.name] if visit.peak_gib is not None]
    tokens_per_s = header.tokens / fmean(_step_s(visits[run.name]))
    return run.name, str(len(run.float8)), f"{max(peaks):.1f}" if peaks else "", f"{tokens_per_s:.0f}"


def _step_s(visits: Sequence[Visit]) -> list[float]:
    return [visit.step_s for visit in visits]
