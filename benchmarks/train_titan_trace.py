"""Where a training step's time goes on one rank's GPU, from a trace of torch.profiler.

In: the trace of some steps, as torchtitan's profiler writes it. Out: for each step the milliseconds of its kernels by
kind, and how long the GPU ran nothing, as Markdown.

Each traced step begins when the GPU has done the one before. A GPU that runs nothing waits for the host, which launches
the kernels, or for another rank. Kernels of several streams run at the same time, so that the kinds may add up to more
than the step.
"""

from __future__ import annotations

import gzip
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
from tabulate import tabulate

from fp8gate.calibrate.breakdown.profiler import kernel_kind

Kind = Literal["bf16 products", "float8 products", "attention", "communication", "optimizer", "casts and others"]
ON_GPU = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})  # categories of a trace's events
FLOAT8 = re.compile(r"e4m3|e5m2|float8|nvjet_(?:sm\d+_)?qq", re.IGNORECASE)
"""In the name of a product. cuBLAS's nvjet kernels name their operands, since CUDA 13 behind the architecture: q is
float8."""
BY_NAME: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("communication", re.compile("nccl|symm_mem|multimem|barrier", re.IGNORECASE)),
    ("attention", re.compile("flash|fmha|attention", re.IGNORECASE)),
    ("optimizer", re.compile("multi_tensor_apply|adam", re.IGNORECASE)),
)


class StepTrace(msgspec.Struct, frozen=True, kw_only=True):
    """Per step of the traced ones, in milliseconds. step: from the first kernel to the last. idle: no kernel ran."""

    run: str
    steps: int
    step_ms: float
    idle_ms: float
    kinds_ms: dict[Kind, float]


def read_trace(file: Path, run: str, steps: int) -> StepTrace:
    """Raises ValueError if nothing ran on a GPU."""
    return summarize(msgspec.json.decode(gzip.decompress(file.read_bytes()))["traceEvents"], run, steps)


def summarize(events: Iterable[dict[str, Any]], run: str, steps: int) -> StepTrace:
    """events: of the trace; ts and dur are in microseconds."""
    kinds: dict[Kind, float] = defaultdict(float)
    ran: list[tuple[float, float]] = []
    for event in events:
        if event.get("cat") in ON_GPU:
            kinds[kind_of(event["name"])] += event["dur"]
            ran.append((event["ts"], event["ts"] + event["dur"]))
    if not ran:
        raise ValueError(f"{run}: expected kernels in the trace, found none")
    span = max(end for _, end in ran) - min(begin for begin, _ in ran)
    per_step = 1e3 * steps
    return StepTrace(
        run=run,
        steps=steps,
        step_ms=round(span / per_step, 3),
        idle_ms=round((span - covered(ran)) / per_step, 3),
        kinds_ms={kind: round(kinds[kind] / per_step, 3) for kind in get_args(Kind)},
    )


def kind_of(name: str) -> Kind:
    for kind, pattern in BY_NAME:
        if pattern.search(name):
            return kind
    if kernel_kind(name) == "product":
        return "float8 products" if FLOAT8.search(name) else "bf16 products"
    return "casts and others"


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the intervals holds."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def report(traces: Sequence[StepTrace]) -> str:
    rows = [
        (one.run, *(f"{ms:.1f}" for ms in (one.step_ms, one.idle_ms, *(one.kinds_ms[kind] for kind in get_args(Kind)))))
        for one in traces
    ]
    headers = ("choice", "ms a step", "GPU idle", *get_args(Kind))
    return tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")
