"""Small records, protocols and set-ups for the tests of `fp8gate.calibrate`."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec

from fp8gate.calibrate.device.kind import NoiseLimits
from fp8gate.calibrate.points.point_record import CONTROL, ArmRecord, PointRecord, Stages
from fp8gate.calibrate.points.setup import Setup
from fp8gate.calibrate.sweep.journal import content_of
from fp8gate.filter.contract.recipes import RECIPES, Recipe
from fp8gate.filter.contract.table import Device, Software, SweepProtocol

SOURCE = Path(__file__).parents[1] / "src"
NOON = datetime(2026, 11, 23, 12, tzinfo=timezone.utc)

CPU = Device(name="CPU Test 9000", kind="cpu", threads=2, memory_gib=16.0)
GPU = Device(name="NVIDIA Test", kind="cuda", memory_gib=80.0)
SOFTWARE = Software(torch="2.13.0", torchao="0.18.0", fp8gate="0.1.0")
PROTOCOL = SweepProtocol(
    timer="wall_clock",
    compile=False,
    inductor={},
    bf16="eager",
    l2="cold",
    data="random",
    settle_s=0.0,
    run_s=0.0,
    pause_s=0.0,
    rounds=(8, 16),
    confidence=0.99,
    threshold=1.0,
    tolerance=0.01,
    near=0.15,
    control=0.2,
)
NEVER_NOISE = NoiseLimits(width=math.inf, apart=math.inf, waited=math.inf, measures_twice=False, far=math.inf)
"""Points of milliseconds, on a machine that others use too, are mostly noise."""
TABLE_PROTOCOL = msgspec.structs.replace(PROTOCOL, estimate="quotient_of_times")
"""PROTOCOL, as a table that is made from records states it."""
PROTOCOLS = dict.fromkeys(RECIPES, PROTOCOL)
SETUP = Setup(device=CPU, software=SOFTWARE, protocols=PROTOCOLS)


def replaced(struct: Any, **fields: Any) -> Any:
    """The struct with other values in these fields."""
    return msgspec.structs.replace(struct, **fields)


def timed_arm(total_us: Sequence[float]) -> ArmRecord:
    """A measured arm whose rounds take these times, half of each forward and half backward."""
    halves = tuple(total / 2 for total in total_us)
    return ArmRecord(fwd_us=halves, bwd_us=halves)


def point_record(shape: tuple[int, int, int] = (64, 32, 16), **fields: Any) -> PointRecord:
    """A record of one shape: tensorwise twice as fast as bf16, unless `arms` says otherwise."""
    m, k, n = shape
    fields.setdefault("arms", {"bf16": timed_arm([200.0] * 8), "tensorwise": timed_arm([100.0] * 8)})
    return PointRecord(
        **{"m": m, "k": k, "n": n, "measured_at": NOON, "stages": Stages(timing_s=1.5), "process": 7, **fields}
    )


def measured(speedup: float = 2.0, *, k: int = 32, recipe: Recipe = "tensorwise", **fields: Any) -> PointRecord:
    """A record whose recipe has this speedup in each sample."""
    arms = {"bf16": timed_arm([100.0] * 8), recipe: timed_arm([100.0 / speedup] * 8)}
    return point_record((64, k, 16), arms=arms, **fields)


def again(speedup: float, *, k: int = 32, process: int = 8, **fields: Any) -> PointRecord:
    """A repeat of the same point, by another process."""
    return measured(speedup, k=k, process=process, repeat=True, **fields)


def controlled(ratio: float) -> PointRecord:
    """A record whose bf16 differs from itself by this ratio."""
    record = measured()
    return replaced(record, arms={**record.arms, CONTROL: timed_arm([100.0 / ratio] * 8)})


def journal_points(folder: Path) -> list[tuple[int, int, int]]:
    """The shapes in the only journal under `folder`, in its order; none if there is no journal yet."""
    journals = list(folder.rglob("journal-*.jsonl"))
    assert len(journals) <= 1
    lines = [line for journal in journals for line in journal.read_bytes().split(b"\n")[1:-1]]
    records = [msgspec.json.decode(content_of(line), type=PointRecord) for line in lines]
    return [(record.m, record.k, record.n) for record in records]


def python(*args: str, **environment: str) -> subprocess.Popen[str]:
    """A fresh Python process that imports this checkout's fp8gate."""
    return subprocess.Popen(
        [sys.executable, *args],
        env={**os.environ, "PYTHONPATH": str(SOURCE), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def quick_points() -> Iterator[None]:
    """Points measured in this process take milliseconds: little is flushed, and no thread waits for another. None is
    noise.

    A process started with `python(..., OMP_NUM_THREADS="1")` has the same set-up.
    """
    import torch

    from fp8gate.calibrate.device import cpu

    threads, flush_bytes, defaults = torch.get_num_threads(), cpu.FLUSH_BYTES, cpu.Cpu.defaults
    torch.set_num_threads(1)
    cpu.Cpu.defaults = dataclasses.replace(defaults, noise=NEVER_NOISE)
    cpu.FLUSH_BYTES = 2**16
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cpu.FLUSH_BYTES = flush_bytes
        cpu.Cpu.defaults = defaults


@contextlib.contextmanager
def quick_visits(locks: Path) -> Iterator[None]:
    """Visits of plans take milliseconds, and the device is not locked for other tests. locks: a folder with a short
    path, as sockets need.
    """
    gc.freeze()  # what is imported is never garbage: looking for it takes a third of a second at each load of a set
    with quick_points(), mock.patch.object(tempfile, "tempdir", str(locks)):
        yield
    gc.unfreeze()
