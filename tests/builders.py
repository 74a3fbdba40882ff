"""Small points, tables and files for the tests of `fp8gate.filter`."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from fp8gate.filter.contract.table import (
    WITH_NUMBERS,
    Device,
    Grid,
    Point,
    Software,
    Status,
    SweepProtocol,
    Table,
    write_table,
)

DEVICE = Device(name="NVIDIA H200", kind="cuda", capability="9.0", multiprocessors=132, memory_gib=139.8)
SOFTWARE_HERE = Software(torch=metadata.version("torch"), torchao=metadata.version("torchao"), fp8gate="0.1.0")
PROTOCOL = SweepProtocol(
    timer="cuda_graphs",
    compile=True,
    inductor={"emulate_precision_casts": True},
    bf16="eager",
    l2="cold",
    data="normal",
    settle_s=0.5,
    run_s=0.0,
    pause_s=0.0,
    rounds=(8, 12),
    confidence=0.99,
    threshold=1.0,
    tolerance=0.01,
    near=0.15,
    control=0.005,
)
MEASURED_AT = datetime(2026, 11, 24, 10, tzinfo=timezone.utc)


def make_point(
    m: int,
    k: int,
    n: int,
    speedup: float = 1.5,
    *,
    bf16_us: tuple[float, float] = (100.0, 200.0),
    spread: float = 1.0,
    status: Status = "measured",
) -> Point:
    """A point whose float8 times are its bf16 times (forward, backward) over `speedup`.

    spread: the bounds are speedup / spread and speedup * spread. A status without numbers gives none.
    """
    if status not in WITH_NUMBERS:
        return Point(m, k, n, *(None,) * 7, status)
    fp8_us = (time_us / speedup for time_us in bf16_us)
    return Point(m, k, n, *bf16_us, *fp8_us, speedup, speedup / spread, speedup * spread, status)


def make_table(*points: Point, **fields: Any) -> Table:
    """A table of these points, made with the software installed here; its grid is that of their sizes."""
    made = {"recipe": "rowwise", "device": DEVICE, "software": SOFTWARE_HERE, "protocol": PROTOCOL}
    made |= {"measured_at": MEASURED_AT, "grid": grid_of(points), "points": points}
    return Table(**{**made, **fields})


def grid_of(points: Iterable[Point]) -> Grid:
    m, k, n = (tuple(sorted(set(axis))) for axis in zip(*((p.m, p.k, p.n) for p in points), strict=True))
    return Grid(m=m, k=k, n=n)


def write_file(table: Table, path: Path) -> Path:
    """Write the table as one file."""
    write_table(table, path)
    return path


def write_folder(folder: Path, *tables: Table) -> Path:
    """Write tables as `fp8gate calibrate` lays them out: <device slug>/<recipe>.yaml."""
    for table in tables:
        write_table(table, folder / table.device.name.lower().replace(" ", "-") / table.variant.file)
    return folder
